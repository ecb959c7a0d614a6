"""Quality of generated images: features in, numbers out, in float64 numpy.

Nothing here knows a network, a file or a device. Features come from the small digit classifier
(`feature_classifier`) or from an Inception network; the formulas are the same.
"""
