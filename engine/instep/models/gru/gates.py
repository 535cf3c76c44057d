"""The GRU's gates between torch's own functions: what torch would do in several passes, in one each.

Every multiplication and addition is rounded by itself and in the order in which `torch.gru` does it, so the bits are
the same; sigmoid and tanh stay torch's. Arrays hold the gates of a row side by side: reset, update, new state.
"""

from __future__ import annotations

from instep.core.compiled import kernel
from instep.core.typing import F32


@kernel
def add_gates(of_input: F32, of_state: F32, biases: F32) -> None:
    """Add the reset and update gates of the state to those of the input: float32 [rows, 3 · width] each.

    `biases`, float32 [2, 3 · width], are added to both before; of shape [0, 0] where the products hold them, or there
    are none.
    """
    width = of_input.shape[1] // 3
    for place in range(len(of_input)):
        gates, other = of_input[place, : 2 * width], of_state[place, : 2 * width]
        if len(biases):
            bias, other_bias = biases[0, : 2 * width], biases[1, : 2 * width]
            for at in range(2 * width):
                gates[at] = (gates[at] + bias[at]) + (other[at] + other_bias[at])
        else:
            for at in range(2 * width):
                gates[at] = gates[at] + other[at]


@kernel
def new_state(of_input: F32, of_state: F32, biases: F32) -> None:
    """Reset the state's part of the new state, and add the input's; the result, before tanh, is in `of_state`.

    `biases` as for `add_gates`.
    """
    width = of_input.shape[1] // 3
    for place in range(len(of_input)):
        reset, of_new = of_input[place, :width], of_input[place, 2 * width :]
        new = of_state[place, 2 * width :]
        if len(biases):
            bias, new_bias = biases[0, 2 * width :], biases[1, 2 * width :]
            for at in range(width):
                new[at] = (new[at] + new_bias[at]) * reset[at] + (of_new[at] + bias[at])
        else:
            for at in range(width):
                new[at] = new[at] * reset[at] + of_new[at]


@kernel
def update_state(state: F32, of_input: F32, of_state: F32) -> None:
    """Let the update gate choose between the state, float32 [rows, width], and the new one: it changes in place."""
    width = state.shape[1]
    for place in range(len(state)):
        old, update, new = state[place], of_input[place, width : 2 * width], of_state[place, 2 * width :]
        for at in range(width):
            old[at] = (old[at] - new[at]) * update[at] + new[at]
