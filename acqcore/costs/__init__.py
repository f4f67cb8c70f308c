"""What scoring will cost before it is run: memory and time of a model configuration, a batch and a device.

Models of few blocks are made from the configuration and scored for a few seconds; the whole model follows, as its
blocks are alike. ``acqcore plan`` is the way in.
"""
