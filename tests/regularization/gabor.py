"""The Gabor model of Prince 2023, "Understanding Deep Learning", 6.3: two weights, thirty points, a sum of squares."""

import torch
from torch import Tensor


def numbers(text: str) -> Tensor:
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


X = numbers("""
    -1.92 -14.22 1.49 -1.94 -2.389 -5.09 -8.861 3.578 -6.01 -6.995
    3.634 .8743 -10.96 .4073 -9.467 8.56 10.62 -.1729 10.40 -12.61
    .1574 -13.04 -2.156 -12.10 -11.19 2.902 -8.22 -11.79 -8.391 -4.505
""")
Y = numbers("""
    -1.051 -.02482 .8896 -.4943 -.9371 .4306 .009577 -.07944 .1624 -.2682
    -.3129 .8303 -.02365 .5098 -.2777 .3367 .1927 -.2222 .06352 .006888
    .03224 .01091 -.5706 -.05258 -.03666 .1709 -.04805 .2008 -.1904 .5952
""")


def loss(phi: Tensor, points: slice = slice(None)) -> Tensor:
    """Return the sum of squares over some of the points."""
    u = phi[0] + 0.06 * phi[1] * X[points]
    return (u.sin() * (-u.square() / 32).exp() - Y[points]).square().sum()
