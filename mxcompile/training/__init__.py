"""Train a model that rounds as the deployed one will, and adapters on a quantized model.

prepare.py           user's model, recipe -> user's class with float weights that round; back again
rounded_weights.py   the parametrization of a weight and the hook on its matmul's input
adapters.py          adapters of peft merged into packed weights
rounded_adapters.py  adapters of peft inside the rounding of a prepared model
"""
