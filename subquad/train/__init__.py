"""Training image classifiers: data held on the device, one recipe, one loop that resumes exactly.

>>> from subquad.train import images, loop, models
>>> data = images.load("mnist", size=32)
>>> model = models.build("vit_tiny_patch16_224", data, mechanism="rala")
>>> loop.train(model, data, loop.Recipe(epochs=5), seed=0, out="runs/first").accuracy
"""
