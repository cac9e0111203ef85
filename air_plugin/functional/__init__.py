"""Every formula of the method, as pure functions of tensors. They import nothing of this package but each other.

fusion: p* = p + lambda p^ (AiR, PLG), and lambda without labels.
similarity: the cosine of an image and a text, also of several vectors an image.
prototypes: the k generated images nearest to their class mean (AiR, ACG).
gaussian: Gaussian classes and their refinement by EM (ours).
shards: sums over images in shards of a fixed size, for images that are not in memory.
calibration: the inverse temperature of a classifier without labels (after Frolic).
pseudo_labels: pseudo-labels of UPL and GRIP, and candidate sets of CPL.
losses: partial-label losses of CPL's family, consistency loss of AiR.
graph: graphs of nearest neighbours.
transclip, stata, zlap: rivals, which classify all images together.
ranking: the largest entries of a row, with a rule for ties.
metrics: accuracy, macro F1, and how good pseudo-labels are.
"""
