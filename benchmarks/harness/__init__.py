"""How it is measured: inputs, clocks, memory, bandwidth and the machine."""
