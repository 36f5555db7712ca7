"""ADF counterparts of torch.nn's modules, and the rules behind them, one file for each family of operations."""

from adfify.nn.activation import (
    CELU,
    ELU,
    GELU,
    SELU,
    Hardsigmoid,
    Hardswish,
    Hardtanh,
    LeakyReLU,
    LogSigmoid,
    Mish,
    PReLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
)  # fmt: skip
from adfify.nn.affine import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Linear,
)  # fmt: skip
from adfify.nn.arithmetic import add, div, mul, neg, sub
from adfify.nn.dropout import AlphaDropout, Dropout, Dropout1d, Dropout2d, Dropout3d, FeatureAlphaDropout
from adfify.nn.max_pooling import MaxPool1d, MaxPool2d, MaxPool3d
from adfify.nn.module import ADFModule
from adfify.nn.normalization import BatchNorm1d, BatchNorm2d, BatchNorm3d
from adfify.nn.pooling import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
)  # fmt: skip
from adfify.nn.structural import ChannelShuffle, Flatten, Identity, Sequential, Unflatten, cat
