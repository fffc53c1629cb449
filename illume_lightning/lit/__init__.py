"""Lightning: the models' training and evaluation, their data, and the accelerators Lightning lacks.

A file here and a file of the same name in `nn` are the training of a model and the model.
"""

from illume_lightning.releases import refuse_compromised

# Before any file here imports lightning.
refuse_compromised()
