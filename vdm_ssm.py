"""Video diffusion with state-space models, in one file.

A video diffusion model turns noise into a video in many small denoising steps. Its network must let every
frame see every other frame. The usual tool is attention over time, whose scores grow with the square of the
number of frames. The papers below use state-space models (SSMs) instead: linear recurrences over time, run
once forward and once backward. This file is that method from the recurrence up to the sampler, on any device.

    python vdm_ssm.py        checks the claims of sections 1 to 3, then compares the papers' layers

References
    [1] Oshima et al., SSM Meets Video Diffusion Models, arXiv 2403.07711 (v1-v3: S4D, v4: Mamba)
    [2] Gu and Dao, Mamba, arXiv 2312.00752    [3] Gu et al., S4D, arXiv 2206.11893
    [4] Ho et al., Video Diffusion Models, arXiv 2204.03458    [5] Ho et al., DDPM, arXiv 2006.11239
    [6] Nichol and Dhariwal, Improved DDPM, arXiv 2102.09672    [7] Song et al., DDIM, arXiv 2010.02502
    [8] Salimans and Ho, Progressive Distillation, arXiv 2202.00512    [9] Su et al., RoFormer, 2104.09864
    [10] Raffel et al., T5, 1910.10683    [11] Katharopoulos et al., 2006.16236; Shen et al., 1812.01243
    [12] Mehta et al., Gated State Spaces (GSS), arXiv 2206.13947; Wang et al., BiGS, arXiv 2212.10544
    [13] Ho and Salimans, Classifier-Free Guidance, 2207.12598    [14] Lu et al., DPM-Solver++, 2211.01095
    [15] Mo and Tian, Scaling Diffusion Mamba with Bidirectional SSMs (DiM), arXiv 2405.15881
    [16] Peebles and Xie, DiT, arXiv 2212.09748    [17] Chen et al., Diffusion Forcing, arXiv 2407.01392

Letters
    b batch    c channels    f frames    h w height and width    l sequence length    d width of a sequence
    n state size    x a video or features    u -> y input and output of an SSM    A B C D its parameters
    dt its step size    t diffusion step    k a frame    beta alpha alpha_bar eps as in DDPM [5]
    A video is (b, c, f, h, w), float, in [-1, 1]. A sequence is (b, l, d).

Map
    1. The recurrence     from a differential equation to selective_scan_loop
    2. S6                 Mamba's SSM: the input chooses what to remember
    3. S4D                an SSM with fixed parameters is a convolution
    4. Temporal layers    the Mamba block, the first paper's block, ablations, attention; temporal_layer(name)
    5. Spatial blocks     step embedding, condition, ResNet block, attention over space, resampling
    6. UNet3D
    7. Diffusion          ddim, dpm_solver, GaussianDiffusion; stream: frames without end
    8. DiM                the second network: patches and Mamba blocks only
    9. The scan at speed  an appendix: selective_scan, equal to the loop, in linear memory

Differs from the papers
    The network computes the official function, with its parameters in the same order. The position table that
    all official variants carry (32 x heads numbers) exists here for its user only, `attention`. The official
    attention stores f x f scores per pixel; here `F.scaled_dot_product_attention` decides. DiM: section 8.
    Not in [1]: a noise level for each frame, and causal networks, whose GroupNorm takes each frame alone: the
    official statistics are over all frames, and would show the past what follows.
"""

import math
import time
from functools import cache, partial
from itertools import cycle

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# 1. From a differential equation to a recurrence
#
# A state-space model reads a signal u over time and keeps a state of n numbers, its memory of the past:
#
#     state' = A state + B u        y = C . state + D u
#
# A is diagonal and negative: each number of the state fades at a rate of its own. Frames are dt apart. If u
# is held from one frame to the next (zero-order hold), the solution is exact:
#
#     state_k = exp(dt A) state_{k-1} + (exp(dt A) - 1) / A  B u_k
#
# Mamba [2] takes the second factor for small dt, where it is dt B (Euler's rule), and lets dt, B and C differ
# from frame to frame. A large dt_k forgets the past and writes frame k; dt_k = 0 leaves the frame out:
#
#     state_k = exp(dt_k A) state_{k-1} + dt_k B_k u_k        y_k = C_k . state_k + D u_k
#
# A sequence has d channels, each with a state and a dt of its own; B and C are shared. The loop below is the
# definition. The layers call `selective_scan`, the same function in linear memory: section 9 tells how.

def selective_scan_loop(u, dt, A, B, C, D=None, initial_state=None, return_last_state=False):
    """The selective scan's definition.    u, dt (b, l, d), A (d, n), B, C (b, l, n), D (d) -> y (b, l, d)

    Differentiable, in any floating dtype; memory grows as b*l*d*n. l >= 1, A < 0, dt >= 0 (in units of a
    frame). `initial_state` (b, d, n) defaults to zeros; with `return_last_state` the result is (y, last state
    (b, d, n)). Source: [2], algorithm 2; as in its code, exact for A and Euler's rule for B."""
    b, l, d = u.shape
    state = u.new_zeros(b, d, A.shape[1]) if initial_state is None else initial_state
    ys = []
    for k in range(l):
        decay = torch.exp(dt[:, k, :, None] * A)  # (b, d, n)
        state = decay * state + (dt * u)[:, k, :, None] * B[:, k, None]
        ys.append((state * C[:, k, None]).sum(-1))  # (b, d)
    y = torch.stack(ys, dim=1)
    y = y if D is None else y + D * u
    return (y, state) if return_last_state else y


# -----------------------------------------------------------------------------
# 2. S6
#
# Mamba's selective SSM [2] lets the input choose how long to remember, what to write and what to read: dt, B
# and C are functions of u_k. A and D are parameters. dt passes a bottleneck of rank d/16 and a softplus:
#
#     dt = softplus(W2 W1 u + bias) > 0,     A = -exp(A_log) < 0,     0 < exp(dt A) < 1.

class S6(nn.Module):
    """Selective SSM.    u (b, l, d) -> y (b, l, d)

    n: state size per channel. Source: [2], algorithm 2, and its initialisation: A = -(1..n), D = 1, and a
    bias that makes dt log-uniform in [1e-3, 1e-1] frames. The rank is ceil(d/16) of the width the SSM itself
    sees, as in [1]. Needs: selective_scan."""

    activation = staticmethod(F.silu)  # what [1] puts after this core

    def __init__(self, d, n=16, dt_min=1e-3, dt_max=1e-1):
        super().__init__()
        self.n, self.rank = n, math.ceil(d / 16)
        self.A_log = nn.Parameter(repeat(torch.arange(1.0, n + 1).log(), "n -> d n", d=d).clone())
        self.D = nn.Parameter(torch.ones(d))
        self.x_proj = nn.Linear(d, self.rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(self.rank, d)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        dt = torch.empty(d).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def choose(self, u):
        """What the input chooses, and A.    u (..., d) -> dt (..., d), A (d, n), B, C (..., n)"""
        low, B, C = self.x_proj(u).split([self.rank, self.n, self.n], dim=-1)
        return F.softplus(self.dt_proj(low)), -torch.exp(self.A_log), B, C

    def forward(self, u, reverse=False, states=None):
        """u (b, l, d) -> y (b, l, d). `reverse` runs from the last frame to the first.

        states: what layers remember of earlier frames, here {this layer: state (b, d, n)}, {} at first. The
        layer begins there, and puts its last state in: a sequence may come in pieces, or frame by frame."""
        states = {} if states is None else states
        parameters = *self.choose(u), self.D, states.get(self), True
        y, states[self] = selective_scan(u, *parameters, reverse)
        return y


# -----------------------------------------------------------------------------
# 3. S4D
#
# With parameters that do not change over time the SSM is a convolution. S4D [3] has n/2 complex modes per
# channel and no B. Zero-order hold, with its factor folded into C, gives
#
#     state_k = exp(dt A) state_{k-1} + u_k    y_k = 2 Re(C' . state_k) + D u_k    C' = C (exp(dt A) - 1) / A
#
# Unrolled, y is u convolved with the impulse response K_k = 2 Re sum_m C'_m exp(dt A_m)^k, where m counts the
# modes, plus D u. An FFT computes it for all frames at once.
#
# Why complex: a real mode can only fade, a complex one also oscillates, and a mode with its conjugate is real
# (2 Re). Why A_m = -1/2 + i pi m: equal decay gives all modes the same window of about 2/dt frames, and the
# frequencies pi m are a Fourier basis on it: the state holds the recent past, C' reads a filter from it. dt
# in 1e-3..1e-1 spreads the windows of the channels from 20 to 2,000 frames.

class S4D(nn.Module):
    """Diagonal SSM with fixed parameters, run as a convolution.    u (b, l, d) -> y (b, l, d)

    n: state size in real numbers, n/2 complex modes; raises ValueError if odd. Source: [3], S4D-Lin."""

    activation = staticmethod(F.gelu)  # what [1] puts after this core

    def __init__(self, d, n=64, dt_min=1e-3, dt_max=1e-1):
        super().__init__()
        if n % 2:
            raise ValueError(f"n is {n}, but the modes of S4D come in pairs: choose an even n")
        self.D = nn.Parameter(torch.randn(d))
        self.C = nn.Parameter(torch.view_as_real(torch.randn(d, n // 2, dtype=torch.cfloat)))
        self.log_dt = nn.Parameter(torch.empty(d).uniform_(math.log(dt_min), math.log(dt_max)))
        self.log_A_real = nn.Parameter(torch.full((d, n // 2), math.log(0.5)))
        self.A_imag = nn.Parameter(repeat(math.pi * torch.arange(n // 2), "n -> d n", d=d).clone())

    def _apply(self, fn, recurse=True):
        # `model.bfloat16()` and `.half()` leave these parameters in float32: fast modes feel 1 % of dt.
        wide = lambda x: fn(x) if fn(x).dtype not in (torch.bfloat16, torch.float16) else x.to(fn(x).device)
        return super()._apply(wide, recurse)

    def discretise(self):
        """Parameters of the recurrence, complex.    -> dt A (d, n/2), C' (d, n/2)"""
        # For dt ~ 1e-3, exp(dt A) - 1 cancels: expm1, and float64 where there is one (a Mac's GPU has none).
        double = torch.float32 if self.D.device.type == "mps" else torch.float64
        A = torch.complex(-self.log_A_real.to(double).exp(), self.A_imag.to(double))
        dt_A = self.log_dt.to(double).exp()[:, None] * A  # (d, n/2)
        C = torch.view_as_complex(self.C.to(double).contiguous())
        return dt_A, C * torch.expm1(dt_A) / A

    def kernel(self, l):
        """The impulse response, without D.    -> K (d, l), float64"""
        # A frame is q i + j with q about sqrt(l), and exp(dt A (q i + j)) = exp(dt A q i) exp(dt A j): two
        # tables of q exponentials and a matrix product over the modes, instead of l exponentials per mode.
        dt_A, C = self.discretise()
        q = math.ceil(math.sqrt(l))
        steps = torch.arange(q, device=dt_A.device)
        fine = torch.exp(dt_A[..., None] * steps)  # (d, n/2, q)
        coarse = C[..., None] * torch.exp(dt_A[..., None] * (q * steps))  # (d, n/2, q)
        real = coarse.real.mT @ fine.real - coarse.imag.mT @ fine.imag  # (d, q, q)
        return 2 * real.flatten(1)[:, :l]

    def convolve(self, u, reverse=False):
        """All frames at once.    u (b, l, d) -> y (b, l, d), without D"""
        # The FFT's convolution is circular: with l zeros at its end, that does not touch its beginning.
        l = u.shape[1]
        K_f = torch.fft.rfft(self.kernel(l).to(u.dtype), n=2 * l)  # (d, l + 1)
        u_f = torch.fft.rfft(u.mT, n=2 * l)  # (b, d, l + 1)
        return torch.fft.irfft(u_f * (K_f.conj() if reverse else K_f), n=2 * l)[..., :l].mT

    def recur(self, u, state=0):
        """The same frame by frame.    u (b, l, d), state (b, d, n/2) or 0 -> y (b, l, d), last state"""
        dt_A, C = (x.to(torch.promote_types(u.dtype, torch.cfloat)) for x in self.discretise())
        decay, ys = torch.exp(dt_A), []
        for u_k in u.unbind(1):
            state = decay * state + u_k[..., None]
            ys.append(2 * (C * state).sum(-1).real)
        return torch.stack(ys, dim=1), state

    def forward(self, u, reverse=False, states=None):
        """u (b, l, d) -> y (b, l, d). `reverse`: y_k depends on u_k and what follows it. states: as in S6."""
        x = u.to(torch.promote_types(u.dtype, torch.float32))  # the FFT knows no bfloat16
        with torch.autocast(u.device.type, enabled=False):
            if states is not None:
                y, states[self] = self.recur(x, states.get(self, 0))
            else:
                y = self.convolve(x, reverse) if len(u) else x  # the FFT may refuse an empty batch
            return (y + self.D * x).to(u.dtype)


# -----------------------------------------------------------------------------
# 4. Temporal layers
#
# Each maps (b, l, d) -> (b, l, d): the rows are pixels and l counts frames. An SSM sees only the past, but a
# video is denoised as a whole: bidirectional layers run a second SSM over the reversed frames and join both.
# The layers of [1] differ in the block around the two cores. First the Mamba block, of the final paper:
#
#     u, z = W_in x     y = SSM(silu(conv(u))) + the same on reversed frames     out = W_out (y * silu(z))

class CausalConv(nn.Conv1d):
    """Depthwise convolution over a frame and those before it.    u (b, l, d) -> (b, l, d)

    `reverse`: a frame and those after it, the nearest with the same weight. width: frames that are seen.
    states: as in S6; what it remembers are the last width - 1 frames."""

    def __init__(self, d, width=4):
        super().__init__(d, d, width, groups=d)

    def forward(self, u, reverse=False, states=None):
        l, more = u.shape[1], self.kernel_size[0] - 1
        if states is not None:
            u = torch.cat([states.get(self, u.new_zeros(len(u), more, u.shape[2])), u], dim=1)
            states[self] = u[:, l:]
        taps = (self.weight.flip(2) if reverse else self.weight).unflatten(1, (1, 1))  # (d, 1, 1, width)
        # As images of one row: conv2d takes channels that lie innermost, as u has them; conv1d would copy u.
        # Padded at both ends: y_k has seen the frames k - more to k.
        y = F.conv2d(u.mT[:, :, None], taps, padding=(0, more), groups=self.groups).squeeze(2).mT
        begin = 0 if states is None and not reverse else more
        return y[:, begin : begin + l] + self.bias


class MambaBlock(nn.Module):
    """A Mamba block whose convolution and SSM run both ways.    x (b, l, d) -> (b, l, d)

    core: a function that makes an SSM of a given width. Input projection, gate and output projection are
    shared by both ways. With an S6 core it is the layer of the final paper, [1] v4. Needs: CausalConv."""

    def __init__(self, core, d, bidirectional=True, expand=2):
        super().__init__()
        self.ahead, self.back = core(expand * d), core(expand * d) if bidirectional else None
        self.in_proj = nn.Linear(d, 2 * expand * d)
        self.ahead_conv = CausalConv(expand * d)
        self.back_conv = CausalConv(expand * d) if bidirectional else None
        self.out_proj = nn.Linear(expand * d, d)

    def forward(self, x, states=None):
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (b, l, 2d) each
        y = self.ahead(F.silu(self.ahead_conv(u, states=states)), states=states)
        if self.back is not None:
            y = y + self.back(F.silu(self.back_conv(u, reverse=True)), reverse=True)
        return self.out_proj(y * F.silu(z))


class GLUBlock(nn.Module):
    """A core, its activation and a gated linear unit each way, summed.    x (b, l, d) -> (b, l, d)

    core: a function that makes an SSM of a given width. Then an MLP of width `mlp`, unless that is None: with
    S4D cores and an MLP it is the layer of the first paper, [1] v1."""

    def __init__(self, core, d, bidirectional=True, mlp=None):
        super().__init__()
        self.ahead, self.ahead_proj = core(d), nn.Linear(d, 2 * d)
        self.back, self.back_proj = (core(d), nn.Linear(d, 2 * d)) if bidirectional else (None, None)
        self.mlp = nn.Sequential(nn.Linear(d, mlp), nn.GELU(), nn.Linear(mlp, d)) if mlp else nn.Identity()

    def forward(self, x, states=None):
        y = F.glu(self.ahead_proj(self.ahead.activation(self.ahead(x, states=states))), dim=-1)
        if self.back is not None:
            y = y + F.glu(self.back_proj(self.back.activation(self.back(x, reverse=True))), dim=-1)
        return self.mlp(y)


class MLPBlock(nn.Module):
    """One bare core each way, concatenated, then an MLP: an ablation of [1].    x (b, l, d) -> (b, l, d)"""

    def __init__(self, core, d, bidirectional=True, mlp=512):
        super().__init__()
        self.ahead, self.back = core(d), core(d) if bidirectional else None
        self.fc1, self.fc2 = nn.Linear(2 * d if bidirectional else d, mlp), nn.Linear(mlp, d)

    def forward(self, x, states=None):
        y = self.ahead(x, states=states)
        if self.back is not None:
            y = torch.cat([y, self.back(x, reverse=True)], dim=-1)  # (b, l, 2d)
        return self.fc2(F.gelu(self.fc1(F.gelu(y))))


class GatedBlock(nn.Module):
    """The product of both ways, gated by a shortcut.    x (b, l, d) -> (b, l, d)

    GSS when forward-only, BiGS when bidirectional [12]; wide: width of the gate. An ablation of [1]."""

    def __init__(self, core, d, bidirectional=True, wide=512):
        super().__init__()
        self.ahead, self.back = core(d), core(d) if bidirectional else None
        self.shortcut = nn.Linear(d, wide)
        self.ahead_in, self.ahead_out = nn.Linear(d, d), nn.Linear(d, d)
        if bidirectional:
            self.back_in, self.back_out = nn.Linear(d, d), nn.Linear(d, d)
        self.gate = nn.Linear(d, wide)
        self.out = nn.Linear(wide, d)

    def forward(self, x, states=None):
        y = self.ahead_out(self.ahead(F.gelu(self.ahead_in(x)), states=states))
        if self.back is not None:
            y = y * self.back_out(self.back(F.gelu(self.back_in(x)), reverse=True))
        return self.out(F.gelu(self.shortcut(x)) * F.gelu(self.gate(y)))


class RotaryEmbedding(nn.Module):
    """Turns feature pairs by an angle proportional to the frame index.    x (..., l, d) -> (..., l, d)

    The first `dims` features are turned, in adjacent pairs (2i, 2i+1), pair i by 10000^(-2i/dims) per frame.
    So the product of a turned query and a turned key depends on their distance alone. Source: [9]."""

    def __init__(self, dims=32):
        super().__init__()
        freqs = 10000.0 ** (-torch.arange(0, dims, 2) / dims)
        self.freqs = nn.Parameter(freqs, requires_grad=False)  # the official parameter counts include it

    def forward(self, x):
        # A pair is a complex number, and its turn one multiplication; the other features are turned by 0.
        real = x.contiguous().to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 has no complex twin
        pairs = torch.view_as_complex(real.unflatten(-1, (-1, 2)))  # (..., l, d/2)
        freqs = F.pad(self.freqs.to(real.dtype), (0, pairs.shape[-1] - len(self.freqs)))
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * freqs  # (l, d/2)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)


class RelativeBias(nn.Module):
    """A learned number for each distance between query and key.    l -> (heads, l, l)

    32 buckets per head: 16 for keys before or at the query, 16 for keys after it; in each half 8 exact
    distances, then logarithmically wider ones up to `max_distance` frames. Source: T5 [10]."""

    def __init__(self, heads, buckets=32, max_distance=32):
        super().__init__()
        self.table = nn.Embedding(buckets, heads)
        self.max_distance = max_distance

    def bucket(self, distance):
        """Signed distances, key minus query.    (...) int -> (...) int in [0, buckets)"""
        half = self.table.num_embeddings // 2
        exact = half // 2
        size = distance.abs()
        share = torch.log(size.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        wide = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
        return half * (distance > 0) + torch.where(size < exact, size, wide)

    def forward(self, l):
        frames = torch.arange(l, device=self.table.weight.device)
        return rearrange(self.table(self.bucket(frames - frames[:, None])), "i j heads -> heads i j")


class Attention(nn.Module):
    """Softmax attention over the rows of a sequence.    x (b, l, d) -> (b, l, d)

    rotary, bias: optional position modules over time, `RotaryEmbedding` and `RelativeBias`. Source: [4]."""

    def __init__(self, d, heads=8, head_dim=64, rotary=None, bias=None, out_bias=False):
        super().__init__()
        self.heads, self.rotary, self.bias = heads, rotary, bias
        self.to_qkv = nn.Linear(d, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, d, bias=out_bias)

    def mix(self, q, k, v):
        """q, k, v (b, heads, l, d) -> (b, heads, l, d)"""
        bias = None if self.bias is None else self.bias(q.shape[2])[None].to(q.dtype)  # (1, heads, l, l)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # scale d^-0.5

    def forward(self, x):
        split = lambda y: rearrange(y, "b l (heads d) -> b heads l d", heads=self.heads)
        q, k, v = map(split, self.to_qkv(x).chunk(3, dim=-1))
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        return self.to_out(rearrange(self.mix(q, k, v), "b heads l d -> b l (heads d)"))


class LinearAttention(Attention):
    """Attention without the l x l scores: keys and values are summed first.    x (b, l, d) -> (b, l, d)

    The query is a softmax over features, scaled by d^-0.5, the key a softmax over positions. Source: [11].
    Needs: Attention."""

    def mix(self, q, k, v):
        """q, k, v (b, heads, l, d) -> (b, heads, l, d), by way of (b, heads, d, d)"""
        return q.softmax(dim=-1) @ (k.softmax(dim=-2).mT @ v * q.shape[-1] ** -0.5)


SSM_LAYERS = "mamba s4d s4d-glu s4d-mlp s4d-gated s4d-mamba s6-glu s6-mlp s6-gated".split()
TEMPORAL_LAYERS = ("attention", "linear-attention", *(f"bi-{name}" for name in SSM_LAYERS), *SSM_LAYERS)


def temporal_layer(name, heads=8, head_dim=64, n=None, mlp=None):
    """Turn a name into a function that makes layers: d -> nn.Module, (b, l, d) -> (b, l, d)

    name: one of TEMPORAL_LAYERS; an SSM layer without "bi-" sees only the past. heads, head_dim: of
    attention. n: state size, default 16, for (bi-)s4d heads * head_dim. mlp: width of the MLP or gate,
    default 512, for (bi-)s4d heads * head_dim, for (bi-)s4d-gated 3d. Layers made by one such function share
    their position tables. Raises ValueError for an unknown name."""
    if name not in TEMPORAL_LAYERS:
        raise ValueError(f"unknown temporal layer {name!r}: choose one of {', '.join(TEMPORAL_LAYERS)}")
    wide = heads * head_dim
    attention = dict(heads=heads, head_dim=head_dim, rotary=RotaryEmbedding(min(32, head_dim)))
    s4d, s6 = partial(S4D, n=n or 16), partial(S6, n=n or 16)  # functions of a width that make cores
    ways = dict(bidirectional=name.startswith("bi-"))
    make = {
        "attention": partial(Attention, bias=RelativeBias(heads), **attention),
        "linear-attention": partial(LinearAttention, **attention),
        "mamba": partial(MambaBlock, s6, **ways),
        "s4d": partial(GLUBlock, partial(S4D, n=n or wide), mlp=mlp or wide, **ways),
        "s4d-glu": partial(GLUBlock, s4d, **ways),
        "s4d-mlp": partial(MLPBlock, s4d, mlp=mlp or 512, **ways),
        "s4d-gated": lambda d: GatedBlock(s4d, d, wide=mlp or 3 * d, **ways),
        "s4d-mamba": partial(MambaBlock, s4d, **ways),
        "s6-glu": partial(GLUBlock, s6, **ways),
        "s6-mlp": partial(MLPBlock, s6, mlp=mlp or 512, **ways),
        "s6-gated": partial(GatedBlock, s6, wide=mlp or 512, **ways),
    }
    return make[name.removeprefix("bi-")]


# -----------------------------------------------------------------------------
# 5. Spatial blocks
#
# Space and time are factorised [4]: these blocks look at one frame at a time, the temporal layers at one
# pixel at a time. In memory the channels lie innermost (channels_last), so that folding frames into the
# batch, (b f) c h w, or pixels into the batch, (b h w) f c, costs nothing or one copy of contiguous runs.

def step_embedding(t, d):
    """Sinusoids of diffusion steps, or of positions.    t (...) integers -> (..., d), sines before cosines"""
    half = d // 2
    freqs = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angle = t[..., None] * freqs  # (..., d/2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Condition(nn.Module):
    """Joins a condition to the step's embedding.    emb (b, d) or (b, f, d) -> (b, 1 or f, d_out)

    cond is any vector (b, cond_dim), one-hot for a class, or (b, f, cond_dim), one for each frame. It is
    appended, as in [1]. `added`: two linear layers turn it into d numbers, which are added instead: a few
    numbers, as an action's, would be lost beside many. A learned null vector [13] takes the place of the
    condition where keep (b) is False, and everywhere without a cond. cond_dim None: emb stays as it is."""

    def __init__(self, d, cond_dim=None, added=False):
        super().__init__()
        self.cond_dim, self.added, self.d_out = cond_dim or 0, added, d if added else d + (cond_dim or 0)
        null = torch.zeros(1, d) if added else torch.randn(1, self.cond_dim)
        self.null = None if cond_dim is None else nn.Parameter(null)
        layers = (nn.Linear(cond_dim, 256), nn.GELU(), nn.Linear(256, d)) if added else ()
        self.project = nn.Sequential(*layers)

    def forward(self, emb, cond=None, keep=None):
        emb = emb[:, None].flatten(1, -2)  # (b, 1 or f, d)
        null = emb[:, 0, :0] if self.null is None else self.null.expand(len(emb), -1)
        known = (len(emb), self.cond_dim)
        if cond is not None and (cond.ndim not in (2, 3) or (len(cond), cond.shape[-1]) != known):
            raise ValueError(f"condition of shape {tuple(cond.shape)}, (b, cond_dim) is {known}")
        joins = null if cond is None else self.project(cond)
        joins = joins[:, None].flatten(1, -2)  # (b, 1 or f, d or cond_dim)
        keep = torch.ones(len(emb), dtype=torch.bool, device=emb.device) if keep is None else keep
        # The null vector takes part in any case: DistributedDataParallel waits for every gradient.
        joins = torch.where(keep[:, None, None], joins, null[:, None]).to(emb.dtype)
        if self.added:
            return emb + joins
        f = max(emb.shape[1], joins.shape[1])
        return torch.cat([emb.expand(-1, f, -1), joins.expand(-1, f, -1)], dim=-1)


class PerFrame(nn.Module):
    """A 2D layer on every frame: a convolution by (1, k, k).    (b, c, f, h, w) -> (b, c', f, h', w')"""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(rearrange(x, "b c f h w -> (b f) c h w"))
        return rearrange(y, "(b f) c h w -> b c f h w", f=x.shape[2])


class ResBlock(nn.Module):
    """Two convolutions with a shortcut.    x (b, c, f, h, w), emb (b, 1 or f, d_emb) -> (b, c_out, f, h, w)

    The step's embedding scales and shifts, all frames or each. GroupNorm's statistics are over all frames;
    causal: over each frame alone. Needs: PerFrame."""

    def __init__(self, c, c_out, d_emb=None, causal=False):
        super().__init__()
        norm = (lambda: PerFrame(nn.GroupNorm(8, c_out))) if causal else (lambda: nn.GroupNorm(8, c_out))
        self.to_scale_shift = None if d_emb is None else nn.Linear(d_emb, 2 * c_out)
        self.conv1, self.norm1 = PerFrame(nn.Conv2d(c, c_out, 3, padding=1)), norm()
        self.conv2, self.norm2 = PerFrame(nn.Conv2d(c_out, c_out, 3, padding=1)), norm()
        self.shortcut = nn.Identity() if c == c_out else PerFrame(nn.Conv2d(c, c_out, 1))

    def forward(self, x, emb=None):
        y = self.norm1(self.conv1(x))
        if emb is not None:
            scale, shift = rearrange(self.to_scale_shift(F.silu(emb)), "b f (two c) -> two b c f 1 1", two=2)
            y = y * (scale + 1) + shift
        y = F.silu(self.norm2(self.conv2(F.silu(y))))
        return y + self.shortcut(x)


class OverSpace(nn.Module):
    """x + layer(norm(x)), where the layer mixes the pixels of a frame.    (b, c, f, h, w) -> the same"""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(c, bias=False)

    def forward(self, x):
        y = self.layer(self.norm(rearrange(x, "b c f h w -> (b f) (h w) c")))
        return x + rearrange(y, "(b f) (h w) c -> b c f h w", f=x.shape[2], h=x.shape[3])


class OverTime(nn.Module):
    """x + layer(norm(x)), where the layer mixes the frames of a pixel.    (b, c, f, h, w) -> the same"""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(c, bias=False)

    def forward(self, x, *states):
        y = self.layer(self.norm(rearrange(x, "b c f h w -> (b h w) f c")), *states)
        return x + rearrange(y, "(b h w) f c -> b c f h w", h=x.shape[3], w=x.shape[4])


# -----------------------------------------------------------------------------
# 6. UNet3D
#
# The video U-Net of [4]: from fine to coarse and back, with skips. Each level is two ResNet blocks, linear
# attention over space and a temporal layer; the middle has full attention over space. The temporal layer
# alone sees more than one frame at a time (GroupNorm aside), and it alone differs between the models of [1].

class UNet3D(nn.Module):
    """Denoising network.    x (b, c, f, h, w), t (b) integers, cond (b, cond_dim) -> (b, c_out, f, h, w)

    t may be (b, f), a diffusion step for each frame, and cond (b, f, cond_dim).

    dim: width of the first level, a multiple of 8; dim_mults: widths of the levels in units of dim; each
    level but the last halves height and width. heads: of every attention; head_dim: of attention over time
    (over space it is 32). temporal: a name from TEMPORAL_LAYERS; n, mlp: see `temporal_layer`. channels,
    out_channels: of the videos. cond_dim, add_cond, cond, keep: see `Condition`. recompute: keep only the
    inputs of the blocks for the backward pass, and compute their insides again there: the same numbers in
    less memory and more time. The number of frames is free. causal: no frame sees those after it. So a
    video may come in pieces, or frame by frame: `states`, {} at first, holds what the temporal layers
    remember of the frames before. A call replaces its entries; a copy of the dictionary is a frozen past.
    Raises ValueError for another dim, an unknown layer or a causal network with one that sees the future, and
    in `forward` for a height or width that is not a multiple of `factor`, 2^(levels - 1). Source: [1], [4].
    At dim 32, heads 4 it is the 14.1M model of [1]."""

    def __init__(self, dim=32, dim_mults=(1, 2, 4, 8), heads=4, head_dim=64, temporal="bi-mamba", n=None,
                 mlp=None, channels=3, out_channels=None, cond_dim=None, add_cond=False, causal=False,
                 recompute=False):  # fmt: skip
        super().__init__()
        if dim < 8 or dim % 8:
            raise ValueError(f"dim is {dim}, but must be a positive multiple of 8, the groups of the norms")
        if causal and temporal not in SSM_LAYERS:
            raise ValueError(f"{temporal!r} sees the frames to come, which a causal network must not: choose "
                             f"one of {', '.join(SSM_LAYERS)}")  # fmt: skip
        widths = [dim, *(dim * m for m in dim_mults)]
        levels = list(zip(widths[:-1], widths[1:]))
        d_step = 32 * dim  # the choice of [1]; [4] has 4 dim
        self.dim, self.factor, self.recompute, self.causal = dim, 2 ** (len(levels) - 1), recompute, causal
        temporal_of = temporal_layer(temporal, heads, head_dim, n, mlp)

        self.condition = Condition(d_step, cond_dim, add_cond)
        block = partial(ResBlock, d_emb=self.condition.d_out, causal=causal)
        self.init_conv = PerFrame(nn.Conv2d(channels, dim, 7, padding=3))
        self.init_time = OverTime(dim, temporal_of(dim))
        self.embed = nn.Sequential(nn.Linear(dim, d_step), nn.GELU(), nn.Linear(d_step, d_step))
        level = lambda c, c_out, resample: nn.ModuleList([
            block(c, c_out),
            block(c_out, c_out),
            OverSpace(c_out, LinearAttention(c_out, heads, head_dim=32, out_bias=True)),
            OverTime(c_out, temporal_of(c_out)),
            PerFrame(resample(c_out, c_out, 4, stride=2, padding=1)) if resample else nn.Identity(),
        ])  # fmt: skip
        self.downs, self.ups, last = nn.ModuleList(), nn.ModuleList(), len(levels) - 1
        for i, (c, c_out) in enumerate(levels):
            self.downs.append(level(c, c_out, nn.Conv2d if i < last else None))
        for i, (c_out, c) in enumerate(reversed(levels)):
            self.ups.append(level(2 * c, c_out, nn.ConvTranspose2d if i < last else None))
        c = widths[-1]
        self.mid_block1 = block(c, c)
        self.mid_space = OverSpace(c, Attention(c, heads, head_dim=32))
        self.mid_time = OverTime(c, temporal_of(c))
        self.mid_block2 = block(c, c)
        self.out_block = ResBlock(2 * dim, dim, causal=causal)
        self.out_conv = PerFrame(nn.Conv2d(dim, out_channels or channels, 1))

    def forward(self, x, t, cond=None, keep=None, states=None):
        h, w = x.shape[-2:]
        if h % self.factor or w % self.factor:
            raise ValueError(f"frames of {h}x{w} pixels: height and width must be multiples of {self.factor}")
        if states is not None and not self.causal:
            raise ValueError("a network that is not causal remembers nothing: make it with causal=True")
        emb = self.embed(step_embedding(t, self.dim).to(x.dtype))
        emb = self.condition(emb, cond, keep)  # (b, 1 or f, 32 dim + cond_dim)
        past = () if states is None else (states,)
        recompute = self.recompute and states is None  # a block that runs twice would remember twice
        run = partial(checkpoint, use_reentrant=False) if recompute else lambda block, *inp: block(*inp)
        x = self.init_conv(x.contiguous(memory_format=torch.channels_last_3d))
        x = run(self.init_time, x, *past)
        first, skips = x, []

        for block1, block2, over_space, over_time, halve in self.downs:
            x = run(block2, run(block1, x, emb), emb)
            x = run(over_time, run(over_space, x), *past)
            skips.append(x)
            x = halve(x)

        x = run(self.mid_block1, x, emb)
        x = run(self.mid_time, run(self.mid_space, x), *past)
        x = run(self.mid_block2, x, emb)

        for block1, block2, over_space, over_time, double in self.ups:
            x = torch.cat([x, skips.pop()], dim=1)
            x = run(block2, run(block1, x, emb), emb)
            x = run(over_time, run(over_space, x), *past)
            x = double(x)

        x = run(self.out_block, torch.cat([x, first], dim=1))
        return self.out_conv(x)


# -----------------------------------------------------------------------------
# 7. Diffusion
#
# Noise is mixed into a video x_0 until nothing of it is left: x_t = signal_t x_0 + noise_t eps, with the two
# rates signal_t = sqrt(alpha_bar_t) and noise_t = sqrt(1 - alpha_bar_t). The network looks at x_t and t and
# is trained by mean squared error to predict eps [5], or x_0, or
#
#     v = signal_t eps - noise_t x_0        [8];
#
# with x_t known, each gives the others. Sampling goes from noise to video: guess x_0 from x_t, move to an
# earlier step s as if the guess were right, and repeat.

def ddim(denoise, x, t, signal, noise, eta=0.0, progress=iter, randn_like=torch.randn_like):
    """Sampler of first order.    x (b, ...) at the noisiest step -> (b, ...) at the end

    denoise: any callable (x, t_i) -> guess of the clean x. t: the m steps to visit, from noisy to clean,
    passed on to denoise. signal, noise: their rates and those of the end, m + 1 numbers each; (1, 0) is
    clean. eta: 0 adds no noise, which is DDIM [7]; 1 draws from q(x_s | x_t, x_0) with its full variance,
    which on all steps is DDPM's ancestral sampling [5]. progress wraps the range of steps, e.g. tqdm.
    randn_like draws what eta adds, e.g. by your own generator. Raises ValueError for eta outside 0..1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: choose 0 (no noise) to 1 (the posterior's)")
    for i in progress(range(len(t))):
        x0 = denoise(x, t[i])
        eps = (x - signal[i] * x0) / noise[i]
        # q(x_s | x_t, x_0) = N(signal_s x0 + sqrt(noise_s^2 - sigma^2) eps, sigma^2) at eta = 1.
        sigma = eta * noise[i + 1] / noise[i] * math.sqrt(1 - (signal[i] / signal[i + 1]) ** 2)
        x = signal[i + 1] * x0 + math.sqrt(max(noise[i + 1] ** 2 - sigma**2, 0)) * eps + sigma * randn_like(x)
    return x


def dpm_solver(denoise, x, t, signal, noise, progress=iter):
    """Sampler of second order, DPM-Solver++ (2M) [14].    x (b, ...) at the noisiest step -> at the end

    Arguments as in `ddim`. DDIM is exact if the guess stays the same during a step. Here it may change
    linearly with log(signal / noise): what counts is its value in the middle of the step, extrapolated from
    the last two guesses. Differs from [14]: by half of their difference at most."""
    last = None
    for i in progress(range(len(t))):
        x0 = guess = denoise(x, t[i])
        if last is not None and noise[i + 1] > 0:  # a line takes two guesses; a clean end is infinitely far
            before, now, after = (math.log(signal[j] / noise[j]) for j in (i - 1, i, i + 1))
            x0 = guess + min((after - now) / (now - before), 1) / 2 * (guess - last)
        last = guess
        x = signal[i + 1] * x0 + noise[i + 1] / noise[i] * (x - signal[i] * x0)
    return x


class GaussianDiffusion(nn.Module):
    """Training loss and sampling around a network.

    model: any callable (x (b, c, f, h, w), t (b) integers in [0, steps)) -> (b, c, f, h, w), which also takes
    cond and keep (see `Condition`) if it is to be conditional. steps: of the cosine schedule [6] with offset
    0.008 and beta <= 0.9999. target: "eps", "v" or "x0". clip: guesses are kept in [-1, 1], as pixels are.
    Raises ValueError for an unknown target, for eps without clip and for steps < 1. Needs: ddim."""

    def __init__(self, model, steps=256, target="eps", clip=True):
        super().__init__()
        if steps < 1:
            raise ValueError(f"a schedule of {steps} steps: choose 1 or more")
        if target not in ("eps", "v", "x0"):
            raise ValueError(f"unknown target {target!r}: choose eps, v or x0")
        if target == "eps" and not clip:
            raise ValueError("target eps needs clip: its error is divided by a signal of 1e-4, and samples "
                             "explode; choose target v or x0 for data outside [-1, 1]")  # fmt: skip
        self.model, self.steps, self.target, self.clip = model, steps, target, clip
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        beta = (1 - (angle[1:].cos() / angle[:-1].cos()).square()).clamp(max=0.9999)
        alpha_bar = torch.cumprod(1 - beta, dim=0)
        # Both roots from float64: 1 - alpha_bar is 1e-4 at the first steps, which float32 would round.
        self.register_buffer("signal_rate", alpha_bar.sqrt().float(), persistent=False)  # (steps)
        self.register_buffer("noise_rate", (1 - alpha_bar).sqrt().float(), persistent=False)

    def rates(self, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t).    t (b) or (b, f) -> two of (b, 1, 1 or f, 1, 1)"""
        t = t[:, None].flatten(1)[:, None, :, None, None]
        return self.signal_rate[t], self.noise_rate[t]

    def add_noise(self, x0, t, eps):
        """x_t of q(x_t | x_0).    x0, eps (b, c, f, h, w), t (b) or (b, f) -> like x0"""
        signal, noise = self.rates(t)
        return signal * x0 + noise * eps

    def losses(self, x0, t=None, eps=None, cond=None, keep=None):
        """Mean squared error for each frame.    x0 (b, c, f, h, w) in [-1, 1], t (b), eps like x0 -> (b, f)

        t may be (b, f), a noise level for each frame [17]. cond is shown where keep (b) is True: guidance
        needs a network that also knows to do without. t (b), eps and keep are drawn unless given, keep with
        probability 0.9."""
        t = torch.randint(self.steps, (len(x0),), device=x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        signal, noise = self.rates(t)
        target = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[self.target]
        keep = torch.rand(len(x0), device=x0.device) < 0.9 if keep is None else keep
        out = self.model(self.add_noise(x0, t, eps), t, *(() if cond is None else (cond, keep)))
        return (out.to(x0.dtype) - target).square().mean((1, 3, 4))

    def loss(self, *args, **kwargs):
        """The mean of `losses`, with the same arguments.    -> scalar"""
        return self.losses(*args, **kwargs).mean()

    def predict_x0(self, x, t, cond=None, states=None):
        """The network's guess.    x (b, c, f, h, w), t (b) or (b, f) -> x0, not clipped

        cond: see `Condition`. states: of a causal network; they stay as they are."""
        signal, noise = self.rates(t)
        past = {} if states is None else {"states": dict(states)}
        out = self.model(x, t, *(() if cond is None else (cond,)), **past).to(x.dtype)
        return {"eps": (x - noise * out) / signal, "x0": out, "v": signal * x - noise * out}[self.target]

    def guided_x0(self, x, t, cond=None, states=None, guidance=1.0):
        """The guess, moved on from the one without the condition [13], and clipped. See `predict_x0`.

        guidance: 0 is the guess without the condition, 1 the one with it, more exaggerates the difference.
        Each target is linear in the guess: it makes no difference which of them is extrapolated."""
        x0 = self.predict_x0(x, t, None if guidance == 0 else cond, states)
        if cond is not None and guidance not in (0, 1):
            null = self.predict_x0(x, t, None, states)
            x0 = null + guidance * (x0 - null)
        return x0.clamp(-1, 1) if self.clip else x0

    @torch.no_grad()
    def sample(self, x, steps=None, sampler=ddim, cond=None, guidance=1.0, progress=iter, past=None, level=0,
               states=None):  # fmt: skip
        """Turns noise into videos.    x (b, c, f, h, w) standard normal -> videos, in [-1, 1] if clipped

        steps: how many of the schedule's steps are visited, evenly spaced; all by default. sampler: ddim,
        dpm_solver or any function like them; partial(ddim, eta=1.0) is DDPM. cond, guidance: see `guided_x0`.
        progress: wraps the range of steps, e.g. tqdm. past (b, c, k, h, w): known frames, which the network
        sees before x and does not change. It must have been trained with a level for each frame. level: the
        noise in past, 0 for clean frames, more for those of `add_noise`. states: what a causal network
        remembers, instead of past. Raises ValueError for steps outside 1..self.steps."""
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.steps:
            raise ValueError(f"cannot sample in {steps} steps: choose 1 to {self.steps}, as the schedule has")
        visited = torch.linspace(self.steps - 1, 0, steps, dtype=torch.float64).round().long().tolist()
        signal, noise = [*self.signal_rate[visited].tolist(), 1.0], [*self.noise_rate[visited].tolist(), 0.0]

        def denoise(x, t):
            t = torch.full((len(x), x.shape[2]), t, device=x.device)
            if past is None:
                return self.guided_x0(x, t[:, 0], cond, states, guidance)
            k, both = past.shape[2], torch.cat([past, x], dim=2)
            t = F.pad(t, (k, 0), value=level)  # (b, k + f)
            return self.guided_x0(both, t, cond, states, guidance)[:, :, k:]

        return sampler(denoise, x, visited, signal, noise, progress=progress)


@torch.no_grad()
def stream(diffusion, draw, past=None, cond=None, steps=5, level=None, **sampling):
    """Frames without end, in constant time and memory, from a causal network.    -> yields (b, c, 1, h, w)

    Each frame is denoised in a few steps from what the network remembers, then shown to it once more at a
    small noise level, with that noise added: only this pass is remembered. The network has been trained on
    noisy frames, and so small errors of its own do not add up [17]. draw: function that returns standard
    normal noise (b, c, 1, h, w). past: frames (b, c, k, h, w) to begin after, remembered under the first
    condition. cond: (b, cond_dim) for all frames, or an iterable of such, one for each new frame, which ends
    the stream. level: 0 to diffusion.steps - 1, by default an eighth of them. sampling: as in
    `GaussianDiffusion.sample`."""
    states, level = {}, diffusion.steps // 8 if level is None else level

    def remember(x0, eps, cond):
        t = torch.full((len(x0),), level, device=x0.device)
        diffusion.model(diffusion.add_noise(x0, t, eps), t, cond, states=states)

    for k, cond_k in enumerate(cycle([cond]) if cond is None or torch.is_tensor(cond) else cond):
        if k == 0 and past is not None:
            remember(past, torch.cat([draw() for _ in past.unbind(2)], dim=2), cond_k)
        x0 = diffusion.sample(draw(), steps, cond=cond_k, states=states, **sampling)
        remember(x0, draw(), cond_k)
        yield x0


# -----------------------------------------------------------------------------
# 8. DiM
#
# A network without attention and without a U-Net's levels [15]: frames are cut into patches of p x p pixels,
# each patch becomes a token, and all tokens of a clip, frame after frame and row after row in a frame, form
# one sequence for Mamba blocks that run both ways. The cost is linear in the number of tokens.
#
# [15] leaves open how the step and the condition enter, and its sizes. Here they enter as in DiT [16], by
# adaLN-zero: they scale and shift what a block sees, and gate what it adds, with gates that are closed at
# first. (DiT's last norm is modulated too; here it is plain.) DIM_SIZES are those of DiT, an assumption.

DIM_SIZES = {"S": dict(depth=12, d=384), "B": dict(depth=12, d=768), "L": dict(depth=24, d=1024),
             "XL": dict(depth=28, d=1152)}  # fmt: skip


class DiMBlock(nn.Module):
    """x + gate * mamba(scale * norm(x) + shift).    x (b, l, d), emb (b, 1 or f, d_emb) -> (b, l, d)

    The l tokens are those of f frames. The identity at first, whatever emb is: adaLN-zero [16].
    Needs: MambaBlock, S6."""

    def __init__(self, d, d_emb, n=16):
        super().__init__()
        self.to_modulation = nn.Linear(d_emb, 3 * d)
        self.norm = nn.LayerNorm(d, elementwise_affine=False)
        self.mamba = MambaBlock(partial(S6, n=n), d)
        nn.init.zeros_(self.to_modulation.weight)
        nn.init.zeros_(self.to_modulation.bias)

    def forward(self, x, emb):
        emb = self.to_modulation(F.silu(emb))
        scale, shift, gate = rearrange(emb, "b f (three d) -> three b f 1 d", three=3)
        by_frame = lambda x: x.unflatten(1, (emb.shape[1], -1))  # (b, 1 or f, tokens, d)
        y = self.mamba((by_frame(self.norm(x)) * (scale + 1) + shift).flatten(1, 2))
        return x + (gate * by_frame(y)).flatten(1, 2)


class DiM(nn.Module):
    """Network of Mamba blocks.    x (b, c, f, h, w), t (b), cond (b, cond_dim) -> (b, c_out, f, h, w)

    t may be (b, f), and cond (b, f, cond_dim). patch: side of a patch in pixels; d: width, a multiple of 8
    from 16 on; depth: number of blocks, DIM_SIZES names some; n: state size. channels, out_channels: of the
    videos. cond_dim, add_cond, cond, keep: see `Condition`. recompute: as in UNet3D. An image is a video of
    one frame. The output is 0 at first. Raises ValueError for another d, and in `forward` for a height or
    width that is no multiple of the patch. Source: [15], [16]."""

    def __init__(self, patch=2, d=384, depth=12, n=16, channels=3, out_channels=None, cond_dim=None,
                 add_cond=False, recompute=False):  # fmt: skip
        super().__init__()
        if d < 16 or d % 8:
            raise ValueError(f"a width of {d}: choose a multiple of 8 from 16 on, which positions share out")
        self.d, self.factor, self.recompute = d, patch, recompute
        self.patch_in = nn.Linear(channels * patch**2, d)
        self.embed = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))
        self.condition = Condition(d, cond_dim, add_cond)
        self.blocks = nn.ModuleList(DiMBlock(d, self.condition.d_out, n) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.patch_out = nn.Linear(d, (out_channels or channels) * patch**2)
        nn.init.zeros_(self.patch_out.weight)
        nn.init.zeros_(self.patch_out.bias)

    def position(self, *size):
        """Sinusoids: half of d tells the frame, a quarter each the row and the column.    -> (f, h, w, d)"""
        frame, row, column = (torch.arange(k, device=self.norm.weight.device) for k in size)
        return torch.cat([
            step_embedding(frame, self.d // 2)[:, None, None].expand(*size, -1),
            step_embedding(row, self.d // 4)[:, None].expand(*size, -1),
            step_embedding(column, self.d // 4).expand(*size, -1),
        ], dim=-1)  # fmt: skip

    def forward(self, x, t, cond=None, keep=None):
        f, (h, w), p = x.shape[2], x.shape[-2:], self.factor
        if h % p or w % p:
            raise ValueError(f"frames of {h}x{w} pixels: both sides must be multiples of the patch, {p}")
        emb = self.embed(step_embedding(t, self.d).to(x.dtype))
        emb = self.condition(emb, cond, keep)  # (b, 1 or f, d + cond_dim)
        x = self.patch_in(rearrange(x, "b c f (h p) (w q) -> b f h w (c p q)", p=p, q=p))
        x = x + self.position(*x.shape[1:4]).to(x.dtype)  # (b, f, h/p, w/p, d)
        x = rearrange(x, "b f h w d -> b (f h w) d")
        for block in self.blocks:
            x = checkpoint(block, x, emb, use_reentrant=False) if self.recompute else block(x, emb)
        x = self.patch_out(self.norm(x))
        return rearrange(x, "b (f h w) (c p q) -> b c f (h p) (w q)", f=f, h=h // p, p=p, q=p)


# -----------------------------------------------------------------------------
# 9. The scan at speed, an appendix
#
# Autograd through the loop of section 1 keeps all states, (b, l, d, n): n times the input. The remedy: keep
# the state before every 16th frame, and compute the others again in the backward pass. `scan_in_chunks` says
# it in ten lines. `selective_scan` does the same with gradients by hand, more than twice as fast.
#
# In a video model every pixel is a row: there are thousands of short sequences. So time is walked frame by
# frame, and the rows are what runs in parallel. No formula divides by a product of decays: it would overflow.

def scan_in_chunks(u, dt, A, B, C, D, initial_state, frames=16):
    """The loop in chunks, recomputed: the idea of `selective_scan`.    its arguments -> y, last state

    Needs: selective_scan_loop, checkpoint."""
    state, ys = initial_state, []
    for u_c, dt_c, B_c, C_c in zip(*(x.split(frames, dim=1) for x in (u, dt, B, C))):
        chunk = (u_c, dt_c, A, B_c, C_c, D, state, True)
        y, state = checkpoint(selective_scan_loop, *chunk, use_reentrant=False)
        ys.append(y)
    return torch.cat(ys, dim=1), state


class SelectiveScan(torch.autograd.Function):
    """`selective_scan` and its gradient by hand; call that instead.

    The work is cut into tiles of rows and chunks of frames. States are (b, k, n, d): with the channels
    innermost, sums over n and over d are matrix products. `chunk` and `chunk_backward` take all frames of a
    chunk at once; `frames` and `frames_backward` compute the same frame by frame, for torch.compile: it makes
    loops of them, whose states stay in registers."""

    CHUNK, CHUNK_COMPILED = 16, 8  # frames; 16 compiled ones overflow a GPU's registers
    TILE, TILE_GPU = 2**16, 2**22  # rows * n * d: what a CPU's cache holds, and what bounds a GPU's memory
    compiled = staticmethod(cache(torch.compile))  # of a function, when it is first needed

    @staticmethod
    def decay(dt, A):
        """exp(dt A).    dt (..., d), A (n, d) -> (..., n, d)"""
        # exp2 has no slow path where exp underflows, and dt A reaches -160. No state feels the difference
        # between 1e-30 and less, but arithmetic with denormal numbers is slow.
        return (dt[..., None, :] * (A * math.log2(math.e))).clamp_(min=-100).exp2_()

    @staticmethod
    def recur(state, u, dt, B, A):
        """state (b, n, d) before a chunk, u, dt (b, k, d), B (b, k, n) -> states, decays (b, k, n, d)"""
        decays = SelectiveScan.decay(dt, A)
        states = (dt * u)[:, :, None] * B[..., None]
        for state_k, decay_k in zip(states.unbind(1), decays.unbind(1)):
            state = state_k.addcmul_(decay_k, state)
        return states, decays

    @staticmethod
    def chunk(state, u, dt, B, C, A, D):
        """state (b, n, d) before the chunk, u, dt (b, k, d), B, C (b, k, n) -> state after it, y (b, k, d)"""
        states, _ = SelectiveScan.recur(state, u, dt, B, A)
        return states[:, -1], torch.addcmul((C[:, :, None] @ states).squeeze(2), D, u)

    @staticmethod
    def frames(state, u, dt, B, C, A, D):
        """The same as `chunk`, frame by frame."""
        ys = []
        for u_k, dt_k, B_k, C_k in zip(*(x.unbind(1) for x in (u, dt, B, C))):
            state = SelectiveScan.decay(dt_k, A) * state + (dt_k * u_k)[:, None] * B_k[..., None]
            ys.append((C_k[..., None] * state).sum(1) + D * u_k)
        return state, torch.stack(ys, 1)

    # The gradient g of the state runs backward in time: g_k = C_k dy_k + exp(dt_{k+1} A) g_{k+1}. Per frame,
    #     d(dt u) = B . g     dB = g . (dt u)     dC = state . dy     w = d(dt A) = g exp(dt A) state_{k-1}
    # and the product rule gives du = dt d(dt u) + D dy, ddt = u d(dt u) + A . w, and dA, the sum of all dt w.

    @staticmethod
    def chunk_backward(state, g, u, dt, B, C, dy, A, D):
        """g (b, n, d) after the chunk -> exp(dt A) g of its first frame, dA, du, ddt, dB, dC"""
        states, w = SelectiveScan.recur(state, u, dt, B, A)
        gs = C[..., None] * dy[:, :, None]  # (b, k, n, d)
        gs[:, -1] += g
        for k in reversed(range(1, u.shape[1])):
            gs[:, k - 1].addcmul_(w[:, k], gs[:, k])
        d_dtu = (B[:, :, None] @ gs).squeeze(2)  # (b, k, d)
        dB = ((dt * u)[:, :, None] @ gs.mT).squeeze(2)
        dC = (dy[:, :, None] @ states.mT).squeeze(2)
        w *= gs
        g = w[:, 0].clone()
        w[:, 0] *= state
        w[:, 1:] *= states[:, :-1]
        ddt = torch.addcmul(torch.mul(w, A, out=gs).sum(2), u, d_dtu)
        dA = w.mul_(dt[:, :, None]).sum(1).sum(0)  # over frames first: each thread then reads what it wrote
        return g, dA, torch.addcmul(D * dy, dt, d_dtu), ddt, dB, dC

    @staticmethod
    def frames_backward(state, g, u, dt, B, C, dy, A, D, part=slice(6)):
        """The same as `chunk_backward`, or a part of it, derived from `frames` by torch."""
        frames = lambda *inputs: SelectiveScan.frames(*inputs, D)
        _, gradients = torch.func.vjp(frames, state, u, dt, B, C, A.expand_as(state))  # an A for each row
        g, du, ddt, dB, dC, dA = gradients((g, dy))
        return (g, dA.sum(0), du, ddt, dB, dC)[part]

    @staticmethod
    def cut(ctx, u, A, D):
        """-> slices of rows, numbered slices of frames in the order of the scan, A (n, d), D"""
        rows = max(1, (SelectiveScan.TILE if u.device.type == "cpu" else SelectiveScan.TILE_GPU) // A.numel())
        frames = SelectiveScan.CHUNK_COMPILED if ctx.compiled else SelectiveScan.CHUNK
        tiles, chunks = ([slice(i, min(i + step, size)) for i in range(0, size, step)]
                         for size, step in zip(u.shape, (rows, frames)))  # fmt: skip
        chunks = list(enumerate(chunks[::-1] if ctx.reverse else chunks))
        return tiles, chunks, A.T.to(ctx.dtype).contiguous(), D.to(ctx.dtype)

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, initial_state, reverse, compiled):
        # The state is in float32 or float64, whatever the inputs are.
        ctx.reverse, ctx.compiled, ctx.dtype = reverse, compiled, torch.promote_types(A.dtype, torch.float32)
        tiles, chunks, *parameters = SelectiveScan.cut(ctx, u, A, D)
        starts = u.new_empty(len(chunks), len(u), *A.T.shape, dtype=ctx.dtype)  # the state before each chunk
        y, last_state = torch.empty_like(u), torch.empty_like(starts[0]).mT  # (b, d, n), d innermost
        in_order = lambda x: x.flip(1) if reverse else x.contiguous()
        chunk = SelectiveScan.compiled(SelectiveScan.frames) if compiled else SelectiveScan.chunk
        with torch.autocast(u.device.type, enabled=False):
            for rows in tiles:
                state = initial_state[rows].mT.to(ctx.dtype).contiguous()  # (b, n, d)
                for i, frames in chunks:
                    starts[i, rows] = state
                    inputs = (in_order(x[rows, frames].to(ctx.dtype)) for x in (u, dt, B, C))
                    state, y_c = chunk(state, *inputs, *parameters)
                    y[rows, frames] = in_order(y_c)
                last_state[rows] = state.mT
        ctx.save_for_backward(u, dt, A, B, C, D, starts)
        return y, last_state

    @staticmethod
    def backward(ctx, dy, dlast_state):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("selective_scan can be differentiated once: take selective_scan_loop for more")
        u, dt, A, B, C, D, starts = ctx.saved_tensors
        tiles, chunks, *parameters = SelectiveScan.cut(ctx, u, A, D)
        *gradients, dinitial_state = (torch.empty_like(x) for x in (u, dt, B, C, dlast_state))
        dA, dD = map(torch.zeros_like, parameters)
        in_order = lambda x: x.flip(1) if ctx.reverse else x.contiguous()
        fused = ctx.compiled and SelectiveScan.compiled(SelectiveScan.frames_backward)
        back = fused or SelectiveScan.chunk_backward
        if fused and u.is_cuda:  # a kernel for sums over n, one for those over d: jointly they store states
            back = lambda *inputs: fused(*inputs, slice(4)) + fused(*inputs, slice(4, 6))
        with torch.autocast(u.device.type, enabled=False):
            for rows in tiles:
                g = dlast_state[rows].mT.contiguous()
                for i, frames in reversed(chunks):
                    inputs = [in_order(x[rows, frames].to(ctx.dtype)) for x in (u, dt, B, C, dy)]
                    g, dA_c, *of_inputs = back(starts[i, rows], g, *inputs, *parameters)
                    dA += dA_c
                    dD += (inputs[0] * inputs[4]).sum((0, 1))  # u dy
                    for gradient, x in zip(gradients, of_inputs):
                        gradient[rows, frames] = in_order(x)
                dinitial_state[rows] = g.mT
        return *gradients[:2], dA.T.to(A.dtype), *gradients[2:], dD.to(D.dtype), dinitial_state, None, None

    run = staticmethod(torch.compiler.disable(lambda *x: SelectiveScan.apply(*x)))  # its loops stay loops


def selective_scan(u, dt, A, B, C, D=None, initial_state=None, return_last_state=False, reverse=False):
    """The selective scan in linear memory.    u, dt (b, l, d), A (d, n), B, C (b, l, n), D (d) -> y (b, l, d)

    The same function as `selective_scan_loop`, with the same arguments and gradients; y has the dtype of u.
    The state is float32 (float64 for a float64 A), also for bfloat16 and float16 inputs and under autocast.
    Kept for the backward pass: the inputs and one state per 16 frames, 8 if compiled. `reverse` walks from
    the last frame to the first, as if all sequences were flipped. In a torch.compile'd model, or as
    torch.compile(selective_scan), it compiles its chunks. Differentiable once: a second derivative raises
    RuntimeError. torch.jit.trace, torch.export and torch.func (vmap, grad, jvp) are not supported;
    `selective_scan_loop` supports them all. Needs: SelectiveScan, selective_scan_loop."""
    D = A.new_zeros(len(A)) if D is None else D
    state = A.new_zeros(len(u), *A.shape) if initial_state is None else initial_state
    if u.shape[1] == 1:  # one frame has no states to save: the definition is faster
        wide = [x.to(torch.promote_types(A.dtype, torch.float32)) for x in (u, dt, A, B, C, D, state)]
        y, state = selective_scan_loop(*wide, True)
    else:
        y, state = SelectiveScan.run(u, dt, A, B, C, D, state, reverse, torch.compiler.is_compiling())
    return (y.to(u.dtype), state) if return_last_state else y.to(u.dtype)


# -----------------------------------------------------------------------------
# python vdm_ssm.py

def relative_error(value, reference):
    """Relative L2 distance.    two tensors of one shape -> float"""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def check_scan(b=4, l=100, d=32, n=16):
    """Print how far `selective_scan` in float32 is from the loop in float64, output and gradients."""
    dt, A = 10 ** torch.empty(b, l, d).uniform_(-4, 1), -torch.arange(1.0, n + 1).repeat(d, 1)
    u, dy, B, C, D = (torch.randn(*shape) for shape in ((b, l, d), (b, l, d), (b, l, n), (b, l, n), (d,)))
    found = []
    for scan, dtype in ((selective_scan, torch.float32), (selective_scan_loop, torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (u, dt, A, B, C, D)]
        y = scan(*inputs)
        found.append([y, *torch.autograd.grad(y, inputs, dy.to(dtype))])
    print("selective_scan in float32 against selective_scan_loop in float64, relative L2 error:")
    errors = zip("y du ddt dA dB dC dD".split(), map(relative_error, *found))
    print(*(f"  {name} {error:.0e}" for name, error in errors))


def check_recurrence(core, b=2, l=100, d=32):
    """Print how far an SSM that takes all frames at once is from its recurrence."""
    ssm, u, states = core(d), torch.randn(b, l, d), {}
    y = torch.cat([ssm(u_k, states=states) for u_k in u.split(1, dim=1)], dim=1)
    print(f"{core.__name__}, at once and frame by frame: {relative_error(ssm(u), y):.0e}")


def table_of_layers(names=TEMPORAL_LAYERS[:13], pixels=64, d=64):
    """Print each layer's parameters, its time, forward + backward, and the memory kept between the two."""
    print(f"\nOne temporal layer, {pixels} pixels, width {d}, 8 heads: ms | MB kept for the backward pass\n"
          f"{'':17s} parameters" + "".join(f"{f'{f} frames':>18s}" for f in (16, 64, 256)))  # fmt: skip
    for name in names:
        layer = temporal_layer(name)(d)
        print(f"{name:17s}{sum(p.numel() for p in layer.parameters()):11,d}", end="", flush=True)
        for x in (torch.randn(pixels, f, d, requires_grad=True) for f in (16, 64, 256)):
            kept = {}
            keep = lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                layer(x).sum().backward()  # also warms up
            start = time.perf_counter()
            layer(x).sum().backward()
            print(f"{1e3 * (time.perf_counter() - start):10.1f} |{sum(kept.values()) / 2**20:6.1f}", end="")
        print()


if __name__ == "__main__":
    torch.manual_seed(0)
    check_scan()
    check_recurrence(S6)
    check_recurrence(S4D)
    table_of_layers()
