"""What one backward pass hands over: every tapped layer's per-sample gradients, by parameter.

``tap`` is where a layer's forward and backward come by, ``forms`` what a per-sample gradient is kept as, and
``recorder`` what collects them until the pass ends. ``which_samples`` and ``picked_rows`` know whose the rows are,
``running_pass`` what pass is running, ``shift`` at which weights. ``traced_tap`` and ``compiled_tap`` are for
``torch.compile`` alone; ``mean_in_16_bits`` and ``refusals`` say what is refused, and why.
"""
