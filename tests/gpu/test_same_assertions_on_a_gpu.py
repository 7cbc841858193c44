"""What tests/unsloth asserts under the interpreter, in float32, of the kernels as they are on a GPU."""

from test_adapter import *
from test_backends_agree import *
from test_rollout import *
from test_save import *
