"""What stands in for a model's forward.

``private_model`` attaches it all to a model. ``model_forward`` is the model's own entry, with ``counted_forward``
around it; ``forwards`` are those of its modules, ``one_by_one`` those at a physical batch of one. ``unsupported`` and
``graph_inputs`` say what cannot be trained, and ``compiling`` is how ``torch.compile`` meets a private model.
"""
