"""What all tests share."""

import torch

# The networks of the tests are tiny: more threads would only wait for each other.
torch.set_num_threads(1)
