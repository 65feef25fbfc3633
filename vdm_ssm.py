"""Video diffusion with state-space models, in one file.

A video diffusion model turns noise into a video in many small denoising steps. Its network must let every frame see
every other frame, and the usual tool, attention over time, needs memory that grows with the square of the number of
frames. The papers below replace it by state-space models (SSMs): linear recurrences over time, run once forward and
once backward. This file is that method from the recurrence up to the sampler, and runs on any device torch runs on.

    python vdm_ssm.py        checks the scan, then prints parameters, time and memory of the papers' layers

References
    [1] Oshima et al., SSM Meets Video Diffusion Models, arXiv 2403.07711. v1-v3 use S4D, v4 bidirectional Mamba.
    [2] Gu and Dao, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv 2312.00752.
    [3] Gu et al., On the Parameterization and Initialization of Diagonal State Space Models (S4D), arXiv 2206.11893.
    [4] Ho et al., Video Diffusion Models, arXiv 2204.03458.
    [5] Ho et al., Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    [6] Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672.
    [7] Song et al., Denoising Diffusion Implicit Models, arXiv 2010.02502.
    [8] Salimans and Ho, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
    [9] Su et al., RoFormer, arXiv 2104.09864.    [10] Raffel et al., T5, arXiv 1910.10683.
    [11] Katharopoulos et al., Transformers are RNNs, arXiv 2006.16236; Shen et al., arXiv 1812.01243.
    [12] Mehta et al., Long Range Language Modeling via Gated State Spaces, arXiv 2206.13947 (GSS);
         Wang et al., Pretraining Without Attention, arXiv 2212.10544 (BiGS).
    [13] Ho and Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598.
    [14] Lu et al., DPM-Solver++, arXiv 2211.01095.
    [15] Mo and Tian, Scaling Diffusion Mamba with Bidirectional SSMs (DiM), arXiv 2405.15881.
    [16] Peebles and Xie, Scalable Diffusion Models with Transformers (DiT), arXiv 2212.09748.

Letters
    b batch    c channels    f frames    h w height and width    l sequence length    d width of a sequence
    n state size    x a video or features    u -> y input and output of an SSM    t diffusion step    k a frame
    dt step size of an SSM    A B C D its parameters    beta alpha alpha_bar eps as in DDPM [5]
    A video is (b, c, f, h, w), float, in [-1, 1]. A sequence is (b, l, d).

Map
    1. Scans              selective_scan_loop, selective_scan
    2. S4D                an SSM as a convolution
    3. S6                 Mamba's selective SSM
    4. Temporal layers    attention, the blocks around S4D and S6, temporal_layer(name)
    5. Spatial blocks     step embedding, condition, ResNet block, attention over space, resampling
    6. UNet3D
    7. Diffusion          ddim, dpm_solver, GaussianDiffusion
    8. DiM                the second network: patches and Mamba blocks only

Differs from the papers
    The network computes the same function as the official code, and its parameters are registered in the same order.
    The position table that all official variants carry (32 x heads numbers) exists here for its user only, `attention`.
    Convolutions are 2D over single frames, which is what (1, k, k) kernels are. The official attention stores f x f
    scores per pixel; here `F.scaled_dot_product_attention` decides, and large inputs go through in tiles. What [15]
    leaves open of DiM is said in section 8.
"""

import math
import time
import weakref
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# 1. Scans
#
# A selective SSM [2] carries a state of n numbers per channel through time:
#
#     state_k = exp(dt_k A) state_{k-1} + dt_k B_k u_k        y_k = C_k . state_k + D u_k
#
# dt, B and C change from frame to frame, so no fixed convolution computes it. Autograd through the loop would keep all
# states, (b, l, d, n), sixteen times the input. The scan below keeps one state per chunk of frames and recomputes the
# rest in its backward pass. In a video model every pixel is a row: there are thousands of short sequences, so time is
# walked step by step and the rows are what runs in parallel.


def selective_scan_loop(u, dt, A, B, C, D=None, initial_state=None, return_last_state=False):
    """The definition of the selective scan.    u, dt (b, l, d), A (d, n), B, C (b, l, n), D (d) -> y (b, l, d)

    Differentiable, in any floating dtype; memory grows as b*l*d*n. l >= 1, A < 0, dt >= 0 (in units of a frame).
    `initial_state` (b, d, n) defaults to zeros; with `return_last_state` the result is (y, last state (b, d, n)).
    Source: [2], algorithm 2; as in its code the discretisation is exact for A and Euler's for B.
    """
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


def rows_in(tile, row, device):
    """How many rows of `row` numbers are worked on at a time: those that a tile of `tile` numbers can hold, or one.

    A CPU is fastest when a tile stays in its cache. A GPU wants all rows at once, within a bound on memory.
    """
    return max(1, (tile if device.type == "cpu" else 64 * tile) // row)


class SelectiveScan(torch.autograd.Function):
    """`selective_scan` and its gradient; call that instead. Needs: rows_in.

    The work is cut into blocks of some rows by CHUNK frames. The states of a block are (b, k, n, d): with the channels
    innermost, every sum over n or d is a matrix product. `ahead` and `back` take a state and its gradient through one
    block; y and the gradients of its frames go straight into the tensors given. `ahead_fused` and `back_fused` compute
    the same frame by frame: torch.compile makes loops of them whose states stay in registers.
    """

    CHUNK = 16  # frames from one stored state to the next: they take 1/16 of the memory of all states
    FUSED = {}  # functions and what torch.compile made of them
    FUSED_CHUNK = 8  # of compiled blocks: 16 frames overflow a GPU's registers and take twice as long to compile

    @staticmethod
    def decay(dt, A, out=None):
        """exp(dt A).    dt (..., d), A (n, d) -> (..., n, d)"""
        # exp2 has no slow path where exp underflows, and dt*A reaches -160. No state feels the difference between 1e-30
        # and less, but a CPU does: arithmetic with denormal numbers is slow.
        return torch.mul(dt[..., None, :], A * math.log2(math.e), out=out).clamp_(min=-100).exp2_()

    @staticmethod
    def room(ctx, count, rows, frames, like):
        """Memory to work in, the same for all blocks: a CPU gets fresh memory more slowly than it computes.

        -> for each size (b, k) of a block, `count` times a tensor (b, k, n, d), a list of its frames in the scan's
        order, and the tensor without its first and without its last frame in that order
        """
        whole = like.new_empty(count, ctx.rows, ctx.chunk, *like.shape[-2:])
        sizes = lambda slices: {x.stop - x.start for x in slices}
        order = slice(None, None, -1 if ctx.reverse else 1)
        ordered = lambda x: (x, x.unbind(1)[order], *(x[:, 1:], x[:, :-1])[order])
        return {(b, k): [ordered(x) for x in whole[:, :b, :k]] for b in sizes(rows) for k in sizes(frames)}

    @staticmethod
    def recur(room, state, dtu, dt, B, A):
        """All states and decays of a block.    state (b, n, d) before it, dt u, dt (b, k, d), B (b, k, n) -> room"""
        (states, frames, *_), (decay, decays, *_), *_ = room = room[dt.shape[:2]]
        SelectiveScan.decay(dt, A, out=decay)
        torch.mul(dtu[:, :, None], B[..., None], out=states)
        for state_k, decay_k in zip(frames, decays):
            state = state_k.addcmul_(decay_k, state)
        return room

    @staticmethod
    def ahead(room, y, state, u, dt, B, C, A, D):
        """Through a block, into y.    state (b, n, d) before it, u, dt, y (b, k, d), B, C (b, k, n) -> state"""
        # Copied before being read n times: rows of long sequences lie powers of two apart; a cache holds few such.
        dt, B, C = (x.contiguous() for x in (dt, B, C))
        (states, frames, *_), _ = SelectiveScan.recur(room, state, dt * u, dt, B, A)
        torch.addcmul((C[:, :, None] @ states).squeeze(2), D, u, out=y)
        return frames[-1]

    @staticmethod
    def ahead_fused(state, u, dt, B, C, A, D):
        """-> state, y"""
        ys = []
        for u_k, dt_k, B_k, C_k in zip(*(x.unbind(1) for x in (u, dt, B, C))):
            state = SelectiveScan.decay(dt_k, A) * state + (dt_k * u_k)[:, None] * B_k[..., None]
            ys.append((C_k[..., None] * state).sum(1) + D * u_k)
        return state, torch.stack(ys, 1)

    # The gradient g of the state runs backward in time: g_k = C_k dy_k + exp(dt_{k+1} A) g_{k+1}. Frame by frame,
    #     d(dt u) = B . g        dB = g . (dt u)        dC = state . dy        w = d(dt A) = g exp(dt A) state_{k-1}
    # and the product rule gives du = dt d(dt u) + D dy, ddt = u d(dt u) + A . w, and dA, the sum of all dt w.

    @staticmethod
    def back(room, gradients, state, carry, u, dt, B, C, dy, A, D):
        """Back through it, into its gradients.    carry (b, n, d), exp(dt A) g of the frame after it -> carry, dA"""
        dt, B, C, dy = (x.contiguous() for x in (dt, B, C, dy))
        dtu, (du, ddt, dB, dC) = dt * u, gradients
        room = SelectiveScan.recur(room, state, dtu, dt, B, A)
        (states, _, _, before), (decay, decays, after, _), (g, gs, *_) = room
        torch.mul(C[..., None], dy[:, :, None], out=g)
        gs[-1].add_(carry)
        for k in reversed(range(1, len(gs))):
            gs[k - 1].addcmul_(decays[k], gs[k])
        d_dtu = (B[:, :, None] @ g).squeeze(2)  # (b, k, d)
        dB.copy_((dtu[:, :, None] @ g.mT).squeeze(2))
        dC.copy_((dy[:, :, None] @ states.mT).squeeze(2))
        w = decay.mul_(g)
        carry = decays[0].clone()
        decays[0].mul_(state)
        after.mul_(before)
        torch.addcmul(D * dy, dt, d_dtu, out=du)
        torch.addcmul(torch.mul(w, A, out=g).sum(2), u, d_dtu, out=ddt)
        # Over k first: so each thread reads the rows that it has written. What passes from core to core is slow.
        return carry, w.mul_(dt[:, :, None]).sum(1).sum(0)

    @staticmethod
    def back_fused(state, carry, u, dt, B, C, dy, A, D, part=slice(6)):
        """-> carry, dA, du, ddt, dB, dC, or a part of them"""
        u, dt, B, C, dy = (x.unbind(1) for x in (u, dt, B, C, dy))
        states, decays, frames, dA = [state], [], [], 0
        for u_k, dt_k, B_k in zip(u, dt, B):
            decays.append(SelectiveScan.decay(dt_k, A))
            states.append(decays[-1] * states[-1] + (dt_k * u_k)[:, None] * B_k[..., None])
        for k in reversed(range(len(u))):
            g = C[k][..., None] * dy[k][:, None] + carry
            carry = decays[k] * g
            w, d_dtu = carry * states[k], (B[k][..., None] * g).sum(1)
            dA = dA + w * dt[k][:, None]
            dB, dC = (g * (dt[k] * u[k])[:, None]).sum(2), (states[k + 1] * dy[k][:, None]).sum(2)
            frames.append((dt[k] * d_dtu + D * dy[k], u[k] * d_dtu + (w * A).sum(1), dB, dC))
        du, ddt, dB, dC = (torch.stack(x[::-1], 1) for x in zip(*frames))
        return (carry, dA.sum(0), du, ddt, dB, dC)[part]

    @staticmethod
    def fuse(function):
        """torch.compile, once for each function, and only when it is needed: it takes a second to load."""
        fused = SelectiveScan.FUSED
        fused[function] = fused.get(function) or torch.compile(function)
        return fused[function]

    @staticmethod
    def ahead_compiled(ctx, y, state, u, dt, B, C, A, D):
        """`ahead`, by way of `ahead_fused`."""
        block = (SelectiveScan.take(x, ctx) for x in (u, dt, B, C))
        state, y_c = SelectiveScan.fuse(SelectiveScan.ahead_fused)(state.clone(), *block, A, D)
        SelectiveScan.put(y, y_c, ctx)
        return state

    @staticmethod
    def back_compiled(ctx, gradients, state, carry, u, dt, B, C, dy, A, D):
        """`back`, by way of `back_fused`."""
        back = SelectiveScan.fuse(SelectiveScan.back_fused)
        block = state.clone(), carry, *(SelectiveScan.take(x, ctx) for x in (u, dt, B, C, dy)), A, D
        if u.device.type == "cpu":
            carry, dA, *of_block = back(*block)
        else:  # one kernel for sums over n, one over d; jointly they would store all states
            carry, dA, *of_block = back(*block, slice(4)) + back(*block, slice(4, 6))
        for gradient, x in zip(gradients, of_block):
            SelectiveScan.put(gradient, x, ctx)
        return carry, dA

    @staticmethod
    def take(x, ctx):
        """Frames in the order of the scan, for a compiled block.    (b, k, d) -> (b, padded, d)"""
        # Each length is compiled anew: blocks are padded to a few. Frames with dt = 0 leave the state as it is.
        return F.pad(x.flip(1) if ctx.reverse else x.contiguous(), (0, 0, 0, ctx.padded - x.shape[1]))

    @staticmethod
    def put(out, x, ctx):
        """The reverse of `take`, into `out`."""
        x = x[:, : out.shape[1]]
        out.copy_(x.flip(1) if ctx.reverse else x)

    @staticmethod
    def blocks(ctx, b, l):
        """Slices of rows and, in the order of the scan, slices of frames; every pair of them is a block."""
        cut = lambda size, step: [slice(i, min(i + step, size)) for i in range(0, size, step)]
        return cut(b, ctx.rows), cut(l, ctx.chunk)[:: -1 if ctx.reverse else 1]

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, initial_state, reverse, compiled):
        (b, l, d), n = u.shape, A.shape[1]
        ctx.reverse, ctx.compiled = reverse, compiled
        ctx.rows = min(max(b, 1), rows_in(2**16, n * d, u.device))
        ctx.chunk = min(l, SelectiveScan.FUSED_CHUNK if compiled else SelectiveScan.CHUNK)
        ctx.padded = min(SelectiveScan.FUSED_CHUNK, 1 << (l - 1).bit_length())
        ctx.dtype = torch.promote_types(A.dtype, torch.float32)  # of the state, whatever the inputs are
        parameters = A.T.to(ctx.dtype).contiguous(), D.to(ctx.dtype)  # (n, d), (d)
        rows, frames = SelectiveScan.blocks(ctx, b, l)
        starts = u.new_empty(len(frames), b, n, d, dtype=ctx.dtype)  # the state before each block
        last_state = u.new_empty(b, d, n, dtype=ctx.dtype)
        y = torch.empty_like(u)
        if compiled:
            ahead = lambda *block: SelectiveScan.ahead_compiled(ctx, *block)
        else:
            room = SelectiveScan.room(ctx, 2, rows, frames, starts)
            ahead = lambda *block: SelectiveScan.ahead(room, *block)

        with torch.autocast(u.device.type, enabled=False):
            for row in rows:
                state = initial_state[row].mT  # (b, n, d)
                for i, frame in enumerate(frames):
                    starts[i, row] = state
                    block = (x[row, frame].to(ctx.dtype) for x in (u, dt, B, C))
                    state = ahead(y[row, frame], starts[i, row], *block, *parameters)
                last_state[row] = state.mT

        ctx.save_for_backward(u, dt, A, B, C, D, starts)
        return y, last_state

    @staticmethod
    def backward(ctx, dy, dlast_state):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("selective_scan can be differentiated once: take selective_scan_loop for more")
        u, dt, A, B, C, D, starts = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (u, dt, B, C)]
        parameters = A.T.to(ctx.dtype).contiguous(), D.to(ctx.dtype)  # (n, d), (d)
        dA, dD = map(torch.zeros_like, parameters)
        dinitial_state = torch.empty_like(dlast_state)
        rows, frames = SelectiveScan.blocks(ctx, *u.shape[:2])
        if ctx.compiled:
            back = lambda *block: SelectiveScan.back_compiled(ctx, *block)
        else:
            room = SelectiveScan.room(ctx, 3, rows, frames, starts)
            back = lambda *block: SelectiveScan.back(room, *block)

        with torch.autocast(u.device.type, enabled=False):
            for row in rows:
                carry = dlast_state[row].mT.contiguous()
                for i, frame in reversed(list(enumerate(frames))):
                    block = [x[row, frame].to(ctx.dtype) for x in (u, dt, B, C, dy)]
                    carry, dA_c = back([x[row, frame] for x in gradients], starts[i, row], carry, *block, *parameters)
                    dA += dA_c
                    dD += (block[0] * block[4]).sum((0, 1))  # u dy
                dinitial_state[row] = carry.mT
        du, ddt, dB, dC = gradients
        return du, ddt, dA.T.to(A.dtype), dB, dC, dD.to(D.dtype), dinitial_state, None, None

    @staticmethod
    @torch.compiler.disable  # which would unroll the loops over blocks
    def run(*arguments):
        return SelectiveScan.apply(*arguments)


def selective_scan(u, dt, A, B, C, D=None, initial_state=None, return_last_state=False, reverse=False):
    """The selective scan in linear memory.    u, dt (b, l, d), A (d, n), B, C (b, l, n), D (d) -> y (b, l, d)

    The same function as `selective_scan_loop`, with the same arguments and gradients; y has the dtype of u. The state
    is float32 (float64 for a float64 A), also for bfloat16 and float16 inputs and under autocast. Kept for the backward
    pass: the inputs and one state per 16 frames. `reverse` walks from the last frame to the first, as if all sequences
    were flipped, without copies of them. Inside a torch.compile'd model, or as torch.compile(selective_scan), it also
    compiles its blocks, once for all lengths. Differentiable once; a second derivative raises RuntimeError.
    Needs: SelectiveScan.
    """
    b, l, d = u.shape
    if D is None:
        D = torch.zeros(d, dtype=A.dtype, device=u.device)
    if initial_state is None:
        initial_state = torch.zeros(b, d, A.shape[1], dtype=A.dtype, device=u.device)
    arguments = (u, dt, A, B, C, D, initial_state, reverse)
    y, last_state = SelectiveScan.run(*arguments, torch.compiler.is_compiling())
    return (y, last_state) if return_last_state else y


def recomputed(function, *inputs):
    """function(*inputs), which the backward pass computes again: it keeps the inputs, and nothing between.

    The scan's bargain, for cheap functions of large tensors. Weights belong among the inputs, or a functional_call
    would differentiate others. No random numbers.
    """
    return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


# -----------------------------------------------------------------------------
# 2. S4D
#
# With parameters that do not change over time the SSM is a convolution. S4D [3] has n/2 complex modes per channel,
#
#     state_k = exp(dt A) state_{k-1} + u_k        y_k = 2 Re(C' . state_k) + D u_k        C' = C (exp(dt A) - 1) / A
#
# (zero-order hold with B = 1, folded into C). Unrolled, y is the causal convolution of u with the impulse response
# K_k = 2 Re sum_m C'_m exp(dt A_m)^k (m runs over the modes), plus D at k = 0: all frames are computed at once.


class FFTConvolution(torch.autograd.Function):
    """Causal convolution over time by FFT.    u (b, l, d), K (d, l) -> y (b, l, d)

    `reverse`: anticausal, y_k depends on u_k and what follows it. Autograd would keep the spectra, eight times u; this
    keeps u alone, and works on some rows at a time: on a CPU, buffers that fit its cache are three times faster.
    FFTConvolution.apply(u, K, reverse), float32 or float64, differentiable once. Needs: rows_in.
    """

    @staticmethod
    def tiles(*tensors):
        """Some rows of each at a time.    (b, l, d) each -> lists of (b', l, d)"""
        b, l, d = tensors[0].shape
        rows = rows_in(2**18, l * d, tensors[0].device)
        return [[x[i : i + rows] for x in tensors] for i in range(0, b, rows)]

    @staticmethod
    def spectrum(x):
        """(..., l, d) -> (..., d, l + 1), complex"""
        # Length 2l: the FFT's convolution is circular; the padding keeps its end from touching its beginning.
        return torch.fft.rfft(x.mT, n=2 * x.shape[-2])

    @staticmethod
    def signal(x_f):
        """The reverse of `spectrum`.    (..., d, l + 1) -> (..., l, d)"""
        l = x_f.shape[-1] - 1
        return torch.fft.irfft(x_f, n=2 * l)[..., :l].mT

    @staticmethod
    def forward(ctx, u, K, reverse):
        ctx.save_for_backward(u, K)
        ctx.reverse = reverse
        K_f = FFTConvolution.spectrum(K.T)  # (d, l + 1)
        K_f, y = K_f.conj().resolve_conj() if reverse else K_f, torch.empty_like(u)
        for u_c, y_c in FFTConvolution.tiles(u, y):
            y_c.copy_(FFTConvolution.signal(FFTConvolution.spectrum(u_c).mul_(K_f)))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        # The adjoint of a convolution is the convolution in the other direction; dK correlates u with dy.
        u, K = ctx.saved_tensors
        K_f = FFTConvolution.spectrum(K.T)
        K_f, du = K_f if ctx.reverse else K_f.conj().resolve_conj(), torch.empty_like(u)
        dK_f = torch.zeros_like(K_f)
        for u_c, dy_c, du_c in FFTConvolution.tiles(u, dy, du):
            u_f, dy_f = FFTConvolution.spectrum(u_c), FFTConvolution.spectrum(dy_c)
            dK_f += torch.linalg.vecdot(dy_f, u_f, dim=0) if ctx.reverse else torch.linalg.vecdot(u_f, dy_f, dim=0)
            du_c.copy_(FFTConvolution.signal(dy_f.mul_(K_f)))
        return du, FFTConvolution.signal(dK_f).T, None


class S4D(nn.Module):
    """Diagonal SSM with fixed parameters, run as a convolution.    u (b, l, d) -> y (b, l, d)

    n: real state size, n/2 complex modes per channel; raises ValueError if odd. Source: [3], S4D-Lin initialisation.
    Needs: FFTConvolution.
    """

    activation = staticmethod(F.gelu)  # what [1] puts after this core

    def __init__(self, d, n=64, dt_min=1e-3, dt_max=1e-1):
        super().__init__()
        if n % 2:
            raise ValueError(f"n is {n}, but the modes of S4D come in pairs: choose an even n")
        self.D = nn.Parameter(torch.randn(d))
        self.C = nn.Parameter(torch.view_as_real(torch.randn(d, n // 2, dtype=torch.cfloat)))  # parts N(0, 1/2)
        self.log_dt = nn.Parameter(torch.empty(d).uniform_(math.log(dt_min), math.log(dt_max)))
        self.log_A_real = nn.Parameter(torch.full((d, n // 2), math.log(0.5)))
        self.A_imag = nn.Parameter(repeat(math.pi * torch.arange(n // 2), "n -> d n", d=d).clone())

    def discretise(self):
        """Parameters of the recurrence, complex.    -> dt A (d, n/2), C' (d, n/2)"""
        # For dt ~ 1e-3, exp(dt A) - 1 cancels: expm1, and float64 where there is one (a Mac's GPU has none).
        double = torch.float32 if self.D.device.type == "mps" else torch.float64
        A = torch.complex(-self.log_A_real.to(double).exp(), self.A_imag.to(double))
        dt_A = self.log_dt.to(double).exp()[:, None] * A  # (d, n/2)
        C = torch.view_as_complex(self.C.to(double).contiguous())
        return dt_A, C * torch.expm1(dt_A) / A

    def kernel(self, l):
        """The impulse response.    -> K (d, l)"""
        # A frame is q i + j with q about sqrt(l), and exp(dt A (q i + j)) = exp(dt A q i) exp(dt A j): two tables of q
        # exponentials per mode and one matrix product over the modes, instead of l exponentials per mode.
        dt_A, C = self.discretise()
        q = math.ceil(math.sqrt(l))
        steps = torch.arange(q, device=dt_A.device)
        fine = torch.exp(dt_A[..., None] * steps)  # (d, n/2, q)
        coarse = C[..., None] * torch.exp(dt_A[..., None] * (q * steps))  # (d, n/2, q)
        real = coarse.real.mT @ fine.real - coarse.imag.mT @ fine.imag  # (d, q, q)
        return 2 * real.flatten(1)[:, :l].to(self.D.dtype)

    def forward(self, u, reverse=False, initial_state=None, return_last_state=False):
        """u (b, l, d) -> y (b, l, d). `reverse` runs from the last frame to the first.

        `initial_state` (b, d, n/2), complex, defaults to zeros; with `return_last_state` the result is (y, last state).
        """
        l, x = u.shape[1], u.to(self.D.dtype)
        with torch.autocast(u.device.type, enabled=False):  # an SSM stays in float32, and the FFT knows no bfloat16
            K = self.kernel(l) + F.pad(self.D[:, None], (0, l - 1))
            if l <= 32:  # the convolution is one l x l matrix per channel, faster than an FFT
                T = F.pad(K, (l - 1, 0)).unfold(1, l, 1).flip(2)  # T[i, j] = K[i - j], (d, l, l)
                y = torch.einsum("dji,bjd->bid" if reverse else "dij,bjd->bid", T, x)
            else:
                y = FFTConvolution.apply(x, K, reverse)
            if initial_state is not None or return_last_state:
                start = self.initial_state(len(u)) if initial_state is None else initial_state
                echo, last_state = self.carry(x, start, reverse)
                y = y + echo
        return (y.to(u.dtype), last_state) if return_last_state else y.to(u.dtype)

    def carry(self, u, state, reverse):
        """What `state` before the first frame adds to y, and the state after the last.    -> (b, l, d), (b, d, n/2)"""
        dt_A, C = self.discretise()
        k = torch.arange(u.shape[1], device=u.device)
        powers = torch.exp(dt_A[..., None] * (k.flip(0) if reverse else k))  # exp(dt A)^k, (d, n/2, l)
        echo = 2 * torch.einsum("bdm,dml->bld", C * torch.exp(dt_A) * state, powers).real
        written = torch.einsum("dml,bld->bdm", powers.flip(2), u.to(powers.dtype))
        return echo.to(u.dtype), torch.exp(dt_A * len(k)) * state + written

    def initial_state(self, b):
        """The state before the first frame.    -> (b, d, n/2), complex"""
        return torch.zeros(b, *self.C.shape[:2], dtype=self.discretise()[0].dtype, device=self.D.device)

    def step(self, u, state):
        """One frame at constant cost.    u (b, d), state (b, d, n/2) -> y (b, d), state"""
        dt_A, C = self.discretise()
        state = torch.exp(dt_A) * state + u[..., None]
        y = 2 * (C * state).sum(-1).real
        return (y + self.D * u).to(u.dtype), state


# -----------------------------------------------------------------------------
# 3. S6
#
# Mamba's selective SSM [2] lets the input choose how long to remember and what to write and read: dt, B and C are
# linear functions of u_k, A and D are parameters. dt passes through a bottleneck of rank d/16 and a softplus, so that
#
#     dt = softplus(W2 W1 u + bias) > 0,     A = -exp(A_log) < 0,     0 < exp(dt A) < 1.


class S6(nn.Module):
    """Selective SSM.    u (b, l, d) -> y (b, l, d)

    n: state size per channel. Source: [2], algorithm 2, and its initialisation: A = -(1..n), D = 1, and a bias that
    makes dt log-uniform in [1e-3, 1e-1] frames. The rank is ceil(d/16) of the width the SSM itself sees, as in [1].
    Needs: selective_scan, recomputed.
    """

    activation = staticmethod(F.silu)  # what [1] puts after this core

    def __init__(self, d, n=16, dt_min=1e-3, dt_max=1e-1):
        super().__init__()
        self.n, self.rank = n, math.ceil(d / 16)
        self.A_log = nn.Parameter(repeat(torch.arange(1.0, n + 1).log(), "n -> d n", d=d).clone())
        self.D = nn.Parameter(torch.ones(d))
        self.x_proj = nn.Linear(d, self.rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(self.rank, d)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        dt = torch.empty(d).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=1e-4)  # Mamba's floor
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def parameters_of(self, u):
        """What the input chooses.    u (b, l, d) -> dt (b, l, d), A (d, n), B, C (b, l, n)"""
        low, B, C = self.x_proj(u).split([self.rank, self.n, self.n], dim=-1)
        # The scan keeps dt for its backward pass; what softplus was given is as large, and soon computed again.
        # Transposed in memory, the weight has a gradient that is a fast product, of a few long rows by a long matrix.
        step = lambda low, weight, bias: F.softplus(F.linear(low.contiguous(), weight.T.contiguous().T, bias))
        dt = recomputed(step, low, self.dt_proj.weight, self.dt_proj.bias)
        return dt, -torch.exp(self.A_log), B, C

    def forward(self, u, reverse=False, initial_state=None, return_last_state=False):
        """u (b, l, d) -> y (b, l, d), with the options of `selective_scan`."""
        dt, A, B, C = self.parameters_of(u)
        return selective_scan(u, dt, A, B, C, self.D, initial_state, return_last_state, reverse)

    def initial_state(self, b):
        """The state before the first frame.    -> (b, d, n)"""
        return torch.zeros(b, *self.A_log.shape, device=self.D.device)

    def step(self, u, state):
        """One frame at constant cost.    u (b, d), state (b, d, n) -> y (b, d), state"""
        y, state = self(u[:, None], initial_state=state, return_last_state=True)
        return y[:, 0], state


# -----------------------------------------------------------------------------
# 4. Temporal layers
#
# Each maps (b, l, d) -> (b, l, d), where the rows are pixels and l counts frames. An SSM sees only the past, but a
# video is denoised as a whole: the bidirectional layers run a second SSM over the reversed frames and join the two.
# The layers of [1] differ in the block around the two cores: a sum, a concatenation, a product, or a Mamba block.
# Attention is the baseline [4].


class RotaryEmbedding(nn.Module):
    """Turns feature pairs by an angle proportional to the frame index.    x (..., l, d) -> (..., l, d)

    The first `dims` features are turned, in adjacent pairs (2i, 2i+1), pair i by 10000^(-2i/dims) per frame. The dot
    product of a turned query and a turned key depends on their positions only through the distance. Source: [9].
    """

    def __init__(self, dims=32):
        super().__init__()
        # A parameter, though fixed: the official parameter counts include it.
        self.freqs = nn.Parameter(10000.0 ** (-torch.arange(0, dims, 2) / dims), requires_grad=False)

    def forward(self, x):
        # A pair is a complex number, and its turn one multiplication; the other features are turned by 0. What follows
        # are matrix products: they would each copy an x that is not contiguous.
        pairs = torch.view_as_complex(x.contiguous().to(self.freqs.dtype).unflatten(-1, (-1, 2)))  # (..., l, d/2)
        freqs = F.pad(self.freqs, (0, pairs.shape[-1] - len(self.freqs)))
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * freqs  # (l, d/2)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(x.dtype)


class RelativeBias(nn.Module):
    """A learned number for each distance between query and key.    l -> (heads, l, l)

    32 buckets per head: 16 for keys before or at the query, 16 for keys after it; in each half 8 exact distances, then
    logarithmically wider ones up to `max_distance` frames. Source: T5 [10].
    """

    def __init__(self, heads, buckets=32, max_distance=32):
        super().__init__()
        self.table = nn.Embedding(buckets, heads)
        self.max_distance = max_distance

    def bucket(self, distance):
        """Signed distances, key minus query.    (...) int -> (...) int in [0, buckets)"""
        half = self.table.num_embeddings // 2
        exact = half // 2
        size = distance.abs()
        share = torch.log(size.clamp(min=1) / exact) / math.log(self.max_distance / exact)  # 1 at max_distance
        wide = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
        return half * (distance > 0) + torch.where(size < exact, size, wide)

    def forward(self, l):
        frames = torch.arange(l, device=self.table.weight.device)
        return rearrange(self.table(self.bucket(frames - frames[:, None])), "i j heads -> heads i j")


def in_tiles(forward):
    """Let attention take some rows of a large x at a time.    forward of a layer, x (b, l, d) -> (b, l, d)

    Queries, keys and values are many times as large as x, and fresh memory costs a CPU more than arithmetic. So where
    they would fill more than four tiles, a tile of rows goes through all of the layer, and again in the backward pass.
    Needs: rows_in, recomputed.
    """

    def tiled(self, x):
        rows = rows_in(2**22, x.shape[1] * self.to_qkv.out_features, x.device)
        if len(x) <= 4 * rows or torch.compiler.is_compiling():
            return forward(self, x)
        names, weights = zip(*self.named_parameters())
        again = lambda x, *weights: torch.func.functional_call(self, dict(zip(names, weights)), x)
        return torch.cat([recomputed(again, tile, *weights) for tile in x.split(rows)])

    return tiled


class Attention(nn.Module):
    """Softmax attention over the rows of a sequence.    x (b, l, d) -> (b, l, d)

    rotary, bias: optional position modules over time, `RotaryEmbedding` and `RelativeBias`. Source: [4].
    Needs: in_tiles.
    """

    def __init__(self, d, heads=8, head_dim=64, rotary=None, bias=None):
        super().__init__()
        self.heads, self.rotary, self.bias = heads, rotary, bias
        self.to_qkv = nn.Linear(d, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, d, bias=False)

    @in_tiles
    def forward(self, x):
        thirds = self.to_qkv.weight.chunk(3)  # thirds of to_qkv(x) would have their gradients joined by a copy
        q, k, v = (F.linear(x, weight) for weight in thirds)  # (b, l, heads d) each
        q, k, v = (rearrange(y, "b l (heads d) -> b heads l d", heads=self.heads) for y in (q, k, v))
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        bias = None if self.bias is None else self.bias(x.shape[-2])[None].to(q.dtype)  # (1, heads, l, l)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # scale head_dim^-0.5
        return self.to_out(rearrange(y, "b heads l d -> b l (heads d)"))


class LinearAttention(nn.Module):
    """Attention without the l x l scores: keys and values are summed first.    x (b, l, d) -> (b, l, d)

    The query is a softmax over features, scaled by head_dim^-0.5, the key a softmax over positions. Source: [11].
    Needs: in_tiles.
    """

    def __init__(self, d, heads=8, head_dim=64, rotary=None, out_bias=False):
        super().__init__()
        self.heads, self.scale, self.rotary = heads, head_dim**-0.5, rotary
        self.to_qkv = nn.Linear(d, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, d, bias=out_bias)

    @in_tiles
    def forward(self, x):
        q, k, v = (F.linear(x, weight) for weight in self.to_qkv.weight.chunk(3))  # (b, l, heads d) each
        q, k, v = (rearrange(y, "b l (heads d) -> b heads l d", heads=self.heads) for y in (q, k, v))
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        q, k = q.softmax(dim=-1), k.softmax(dim=-2)
        if x.shape[-2] > v.shape[-1]:
            y = q @ (k.mT @ v * self.scale)  # by way of (b, heads, d, d)
        else:
            y = (q @ k.mT * self.scale) @ v  # the same, by way of (b, heads, l, l): less for short sequences
        return self.to_out(rearrange(y, "b heads l d -> b l (heads d)"))


class GLU(nn.Module):
    """A core, an activation, and a gated linear unit.    u (b, l, d) -> (b, l, d)

    core: an SSM of width d, S4D or S6, with its `activation`.
    """

    def __init__(self, core, d):
        super().__init__()
        self.core, self.proj = core, nn.Linear(d, 2 * d)

    def forward(self, u, reverse=False):
        return F.glu(self.proj(self.core.activation(self.core(u, reverse))), dim=-1)


class GLUBlock(nn.Module):
    """One GLU core each way, summed; then an MLP unless `mlp` is None.    x (b, l, d) -> (b, l, d)

    With S4D cores and an MLP it is the layer of the first paper, [1] v1. Needs: GLU.
    """

    def __init__(self, core, d, bidirectional=True, mlp=None):
        super().__init__()
        self.ahead = GLU(core(d), d)
        self.back = GLU(core(d), d) if bidirectional else None
        self.mlp = nn.Identity() if mlp is None else nn.Sequential(nn.Linear(d, mlp), nn.GELU(), nn.Linear(mlp, d))

    def forward(self, x):
        y = self.ahead(x)
        if self.back is not None:
            y = y + self.back(x, reverse=True)
        return self.mlp(y)


class MLPBlock(nn.Module):
    """One bare core each way, concatenated, then an MLP.    x (b, l, d) -> (b, l, d)

    An ablation of [1].
    """

    def __init__(self, core, d, bidirectional=True, mlp=512):
        super().__init__()
        self.ahead = core(d)
        self.back = core(d) if bidirectional else None
        self.fc1 = nn.Linear(2 * d if bidirectional else d, mlp)
        self.fc2 = nn.Linear(mlp, d)

    def forward(self, x):
        y = self.ahead(x)
        if self.back is not None:
            y = torch.cat([y, self.back(x, reverse=True)], dim=-1)  # (b, l, 2d)
        return self.fc2(F.gelu(self.fc1(F.gelu(y))))


class GatedBlock(nn.Module):
    """The product of both ways, gated by a shortcut.    x (b, l, d) -> (b, l, d)

    GSS when forward-only, BiGS when bidirectional [12]; `wide` is the width of the gate. An ablation of [1].
    """

    def __init__(self, core, d, bidirectional=True, wide=512):
        super().__init__()
        self.ahead = core(d)
        self.back = core(d) if bidirectional else None
        self.shortcut = nn.Linear(d, wide)
        self.ahead_in, self.ahead_out = nn.Linear(d, d), nn.Linear(d, d)
        if bidirectional:
            self.back_in, self.back_out = nn.Linear(d, d), nn.Linear(d, d)
        self.gate = nn.Linear(d, wide)
        self.out = nn.Linear(wide, d)

    def forward(self, x):
        y = self.ahead_out(self.ahead(F.gelu(self.ahead_in(x))))
        if self.back is not None:
            y = y * self.back_out(self.back(F.gelu(self.back_in(x)), reverse=True))
        return self.out(F.gelu(self.shortcut(x)) * F.gelu(self.gate(y)))


def causal_conv(u, weight, bias, reverse=False):
    """Depthwise convolution over a frame and those before it.    u (b, l, d), weight (d, 1, width), bias (d)

    `reverse` takes the frames after it instead, the nearest with the same weight.
    """
    # As images of one row of pixels, whose channels lie innermost as u has them: a Conv1d wants time innermost.
    l, more = u.shape[1], weight.shape[2] - 1
    taps = weight.flip(2) if reverse else weight
    # Padded at both ends: y (b, l + more, d), where y_k has seen the frames k - more to k.
    # (A view of the taps by unflatten gives a gradient that lies in memory as they do, which an index does not.)
    y = F.conv2d(u.mT[:, :, None], taps.unflatten(1, (1, 1)), padding=(0, more), groups=len(weight)).squeeze(2).mT
    return (y[:, more:] if reverse else y[:, :l]) + bias


class CausalConv(nn.Module):
    """silu(`causal_conv`), with the weights.    u (b, l, d) -> (b, l, d)

    Needs: causal_conv, recomputed.
    """

    def __init__(self, d, width=4):
        super().__init__()
        conv = nn.Conv1d(d, d, width, groups=d)  # for its initialisation
        self.weight, self.bias = conv.weight, conv.bias  # (d, 1, width), (d)

    def forward(self, u, reverse=False):
        return recomputed(lambda *inputs: F.silu(causal_conv(*inputs, reverse)), u, self.weight, self.bias)


class MambaBlock(nn.Module):
    """A Mamba block whose convolution and SSM run both ways.    x (b, l, d) -> (b, l, d)

        u, z = W_in x        y = SSM(silu(conv(u))) + the same on reversed frames        out = W_out (y * silu(z))

    Input projection, gate and output projection are shared by both ways. With an S6 core it is the layer of the final
    paper, [1] v4. Needs: CausalConv, recomputed.
    """

    def __init__(self, core, d, bidirectional=True, expand=2):
        super().__init__()
        self.ahead = core(expand * d)
        self.back = core(expand * d) if bidirectional else None
        self.in_proj = nn.Linear(d, 2 * expand * d)
        self.ahead_conv = CausalConv(expand * d)
        self.back_conv = CausalConv(expand * d) if bidirectional else None
        self.out_proj = nn.Linear(expand * d, d)

    def forward(self, x):
        halves = zip(self.in_proj.weight.chunk(2), self.in_proj.bias.chunk(2))  # so their gradients need no joining
        u, z = (F.linear(x, weight, bias) for weight, bias in halves)  # (b, l, 2d) each
        y = self.ahead(self.ahead_conv(u))
        if self.back is not None:
            y = y + self.back(self.back_conv(u, reverse=True), reverse=True)
        return self.out_proj(recomputed(lambda y, z: y * F.silu(z), y, z))


TEMPORAL_LAYERS = ("attention", "linear-attention", "bi-mamba", "bi-s4d", "bi-s4d-glu", "bi-s4d-mlp", "bi-s4d-gated",
                   "bi-s4d-mamba", "bi-s6-glu", "bi-s6-mlp", "bi-s6-gated", "mamba", "s4d", "s4d-glu", "s4d-mlp",
                   "s4d-gated", "s4d-mamba", "s6-glu", "s6-mlp", "s6-gated")  # fmt: skip


def temporal_layer(name, heads=8, head_dim=64, n=None, mlp=None):
    """Turn a name into a function that makes layers: d -> nn.Module, (b, l, d) -> (b, l, d)

    name: one of TEMPORAL_LAYERS; an SSM layer without "bi-" sees only the past. heads, head_dim: of attention.
    n: state size, default 16, for (bi-)s4d heads * head_dim. mlp: width of the MLP or gate, default 512, for (bi-)s4d
    heads * head_dim, for (bi-)s4d-gated 3d. Layers made by one such function share their position tables.
    Raises ValueError for an unknown name.
    """
    if name not in TEMPORAL_LAYERS:
        raise ValueError(f"unknown temporal layer {name!r}: choose one of {', '.join(TEMPORAL_LAYERS)}")
    wide = heads * head_dim
    s4d, s4d_wide, s6 = partial(S4D, n=n or 16), partial(S4D, n=n or wide), partial(S6, n=n or 16)  # cores by width
    ways = dict(bidirectional=name.startswith("bi-"))
    rotary = RotaryEmbedding(min(32, head_dim))
    make = {
        "attention": partial(Attention, heads=heads, head_dim=head_dim, rotary=rotary, bias=RelativeBias(heads)),
        "linear-attention": partial(LinearAttention, heads=heads, head_dim=head_dim, rotary=rotary),
        "s4d": partial(GLUBlock, s4d_wide, mlp=mlp or wide, **ways),
        "mamba": partial(MambaBlock, s6, **ways),
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
# Space and time are factorised [4]: these blocks look at one frame at a time, the temporal layers at one pixel at a
# time. In memory the channels lie innermost (channels_last), so that folding frames into the batch, (b f) c h w, or
# pixels into the batch, (b h w) f c, costs nothing or one copy of contiguous runs.


def step_embedding(t, d):
    """Sinusoids of diffusion steps, or of positions.    t (b) integers -> (b, d), sines first, then cosines"""
    half = d // 2
    freqs = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angle = t[:, None] * freqs  # (b, d/2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Condition(nn.Module):
    """Appends a condition to the embedding of the step.    emb (b, d), cond (b, cond_dim) -> (b, d + cond_dim)

    cond is any vector, one-hot for a class. A learned null vector [13] takes its place where keep (b), bool, is False,
    and everywhere if there is no cond. Without a cond_dim nothing is appended. Raises ValueError for another shape.
    """

    def __init__(self, cond_dim=None):
        super().__init__()
        self.null = None if cond_dim is None else nn.Parameter(torch.randn(1, cond_dim))

    def forward(self, emb, cond=None, keep=None):
        null = emb[:, :0] if self.null is None else self.null.expand(len(emb), -1)
        cond = null if cond is None else cond
        if cond.shape != null.shape:
            raise ValueError(f"a condition of shape {tuple(cond.shape)}: (b, cond_dim) of this network is "
                             f"{tuple(null.shape)}")  # fmt: skip
        keep = torch.ones(len(emb), dtype=torch.bool, device=emb.device) if keep is None else keep
        # The null vector takes part in any case: DistributedDataParallel waits for every parameter's gradient.
        return torch.cat([emb, torch.where(keep[:, None], cond, null).to(emb.dtype)], dim=1)


class FrameConv(nn.Conv2d):
    """A 2D convolution of every frame: a kernel (1, k, k).    x (b, c, f, h, w) -> (b, c', f, h', w')"""

    def forward(self, x):
        y = super().forward(rearrange(x, "b c f h w -> (b f) c h w"))
        return rearrange(y, "(b f) c h w -> b c f h w", b=len(x))


class FrameUpsample(nn.ConvTranspose2d):
    """Doubles height and width of every frame.    x (b, c, f, h, w) -> (b, c, f, 2h, 2w)"""

    def __init__(self, c):
        super().__init__(c, c, kernel_size=4, stride=2, padding=1)

    def forward(self, x):
        y = super().forward(rearrange(x, "b c f h w -> (b f) c h w"))
        return rearrange(y, "(b f) c h w -> b c f h w", b=len(x))


class ResBlock(nn.Module):
    """Two convolutions with a shortcut; the diffusion step scales and shifts.    x (b, c, f, h, w) -> (b, c', f, h, w)

    GroupNorm has 8 groups and takes its statistics over all frames of a clip. emb (b, d_emb).
    Needs: FrameConv, recomputed.
    """

    def __init__(self, c, c_out, d_emb=None):
        super().__init__()
        self.to_scale_shift = None if d_emb is None else nn.Linear(d_emb, 2 * c_out)
        self.conv1, self.norm1 = FrameConv(c, c_out, 3, padding=1), nn.GroupNorm(8, c_out)
        self.conv2, self.norm2 = FrameConv(c_out, c_out, 3, padding=1), nn.GroupNorm(8, c_out)
        self.shortcut = nn.Identity() if c == c_out else FrameConv(c, c_out, 1)

    @staticmethod
    def activation(y, weight, bias, scale=None, shift=None):
        y = F.group_norm(y, 8, weight, bias)
        return F.silu(y if scale is None else y * (scale + 1) + shift)

    def forward(self, x, emb=None):
        scale_shift = ()
        if emb is not None:
            scale_shift = rearrange(self.to_scale_shift(F.silu(emb)), "b (two c) -> two b c 1 1 1", two=2)
        y = recomputed(self.activation, self.conv1(x), self.norm1.weight, self.norm1.bias, *scale_shift)
        y = recomputed(self.activation, self.conv2(y), self.norm2.weight, self.norm2.bias)
        return y + self.shortcut(x)


class OverSpace(nn.Module):
    """x + layer(norm(x)), where the layer mixes the pixels of each frame.    x (b, c, f, h, w) -> (b, c, f, h, w)"""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(c, bias=False)

    def forward(self, x):
        b, c, f, h, w = x.shape
        y = self.layer(self.norm(rearrange(x, "b c f h w -> (b f) (h w) c")))
        return x + rearrange(y, "(b f) (h w) c -> b c f h w", b=b, h=h)


class OverTime(nn.Module):
    """x + layer(norm(x)), where the layer mixes the frames of each pixel.    x (b, c, f, h, w) -> (b, c, f, h, w)"""

    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.norm = layer, nn.LayerNorm(c, bias=False)

    def forward(self, x):
        b, c, f, h, w = x.shape
        y = self.layer(self.norm(rearrange(x, "b c f h w -> (b h w) f c")))
        return x + rearrange(y, "(b h w) f c -> b c f h w", b=b, h=h)


# -----------------------------------------------------------------------------
# 6. UNet3D
#
# The video U-Net of [4]: from fine to coarse and back, with skips. Each level is two ResNet blocks, linear attention
# over space and a temporal layer; the middle has full attention over space. The temporal layer is the only part that
# sees more than one frame at a time (GroupNorm aside), and the only part in which the models of [1] differ.


class UNet3D(nn.Module):
    """Denoising network.    x (b, c, f, h, w), t (b) integers, cond (b, cond_dim) -> (b, c_out, f, h, w)

    dim: width of the first level, a multiple of 8; dim_mults: widths of the levels in units of dim; each level but the
    last halves height and width. heads: of every attention; head_dim: of attention over time (over space it is 32).
    temporal: a name from TEMPORAL_LAYERS; n, mlp: see `temporal_layer`. channels, out_channels: of the videos.
    cond_dim, cond, keep: see `Condition`. recompute: keep only the inputs of the blocks for the backward pass, and
    compute their insides again there: the same numbers in less memory and more time. The number of frames is free.
    Raises ValueError for another dim or an unknown layer, and in `forward` for a height or width that is not a multiple
    of `factor`, 2^(levels - 1).
    Source: [1], [4]. At dim 32, heads 4 it is the 14.1M model of [1].
    """

    def __init__(self, dim=32, dim_mults=(1, 2, 4, 8), heads=4, head_dim=64, temporal="bi-mamba", n=None, mlp=None,
                 channels=3, out_channels=None, cond_dim=None, recompute=False):  # fmt: skip
        super().__init__()
        if dim < 8 or dim % 8:
            raise ValueError(f"dim is {dim}, but must be a positive multiple of 8, the number of groups of the norms")
        widths = [dim, *(dim * m for m in dim_mults)]
        levels = list(zip(widths[:-1], widths[1:]))
        d_step = 32 * dim  # the choice of [1]; [4] has 4 dim
        d_emb = d_step + (cond_dim or 0)
        self.dim, self.factor = dim, 2 ** (len(levels) - 1)
        temporal_of = temporal_layer(temporal, heads, head_dim, n, mlp)

        self.condition = Condition(cond_dim)
        self.init_conv = FrameConv(channels, dim, 7, padding=3)
        self.init_time = OverTime(dim, temporal_of(dim))
        self.embed = nn.Sequential(nn.Linear(dim, d_step), nn.GELU(), nn.Linear(d_step, d_step))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i, (c, c_out) in enumerate(levels):
            self.downs.append(nn.ModuleList([
                ResBlock(c, c_out, d_emb),
                ResBlock(c_out, c_out, d_emb),
                OverSpace(c_out, LinearAttention(c_out, heads, head_dim=32, out_bias=True)),
                OverTime(c_out, temporal_of(c_out)),
                FrameConv(c_out, c_out, 4, stride=2, padding=1) if i < len(levels) - 1 else nn.Identity(),
            ]))  # fmt: skip
        for i, (c_out, c) in enumerate(reversed(levels)):
            self.ups.append(nn.ModuleList([
                ResBlock(2 * c, c_out, d_emb),
                ResBlock(c_out, c_out, d_emb),
                OverSpace(c_out, LinearAttention(c_out, heads, head_dim=32, out_bias=True)),
                OverTime(c_out, temporal_of(c_out)),
                FrameUpsample(c_out) if i < len(levels) - 1 else nn.Identity(),
            ]))  # fmt: skip
        c = widths[-1]
        self.mid_block1 = ResBlock(c, c, d_emb)
        self.mid_space = OverSpace(c, Attention(c, heads, head_dim=32))
        self.mid_time = OverTime(c, temporal_of(c))
        self.mid_block2 = ResBlock(c, c, d_emb)
        self.out_block = ResBlock(2 * dim, dim)
        self.out_conv = FrameConv(dim, out_channels or channels, 1)
        for block in self.modules():
            if recompute and isinstance(block, (ResBlock, OverSpace, OverTime)):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def forward(self, x, t, cond=None, keep=None):
        h, w = x.shape[-2:]
        if h % self.factor or w % self.factor:
            raise ValueError(f"frames of {h}x{w} pixels: height and width must be multiples of {self.factor}")
        emb = self.embed(step_embedding(t, self.dim).to(x.dtype))
        emb = self.condition(emb, cond, keep)  # (b, 32 dim + cond_dim)
        x = self.init_conv(x.contiguous(memory_format=torch.channels_last_3d))
        x = self.init_time(x)
        first, skips = x, []

        for block1, block2, over_space, over_time, halve in self.downs:
            x = block2(block1(x, emb), emb)
            x = over_time(over_space(x))
            skips.append(x)
            x = halve(x)

        x = self.mid_block1(x, emb)
        x = self.mid_time(self.mid_space(x))
        x = self.mid_block2(x, emb)

        for block1, block2, over_space, over_time, double in self.ups:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block2(block1(x, emb), emb)
            x = over_time(over_space(x))
            x = double(x)

        return self.out_conv(self.out_block(torch.cat([x, first], dim=1)))


# -----------------------------------------------------------------------------
# 7. Diffusion
#
# Noise is mixed into a video x_0 until nothing of it is left: x_t = signal_t x_0 + noise_t eps, with the two rates
# signal_t = sqrt(alpha_bar_t) and noise_t = sqrt(1 - alpha_bar_t). The network looks at x_t and t and is trained by
# mean squared error to predict eps [5], or x_0, or
#
#     v = signal_t eps - noise_t x_0        [8];
#
# with x_t known, each gives the others. Sampling goes from noise to video: guess x_0 from x_t, move to an earlier step
# s as if the guess were right, and repeat.


def ddim(denoise, x, t, signal, noise, eta=0.0, progress=iter, randn_like=torch.randn_like):
    """Sampler of first order.    x (b, ...) at the noisiest step -> (b, ...) at the end

    denoise: any callable (x, t_i) -> guess of the clean x. t: the m steps to visit, from noisy to clean, passed on to
    denoise. signal, noise: their rates and those of the end, m + 1 numbers each; (1, 0) is clean. eta: 0 adds no noise,
    which is DDIM [7]; 1 draws from q(x_s | x_t, x_0) with its full variance, which on all steps is DDPM's ancestral
    sampling [5]. progress wraps the range of steps, e.g. tqdm. randn_like draws what eta adds, e.g. by a generator of
    your own. Raises ValueError for eta outside 0..1.
    """
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
    """Sampler of second order, DPM-Solver++ (2M) [14].    x (b, ...) at the noisiest step -> (b, ...) at the end

    Arguments as in `ddim`. DDIM is exact if the guess stays the same during a step. Here it may change linearly with
    log(signal / noise): what counts is its value in the middle of the step, extrapolated from the last two guesses.
    Differs from [14]: by no more than half of their difference, as if the last step had been as long as this one.
    """
    last = None
    for i in progress(range(len(t))):
        x0 = guess = denoise(x, t[i])
        if last is not None and noise[i + 1] > 0:  # a line takes two guesses, and a clean end is infinitely far
            before, now, after = (math.log(signal[j] / noise[j]) for j in (i - 1, i, i + 1))
            x0 = guess + min((after - now) / (now - before), 1) / 2 * (guess - last)
        last = guess
        x = signal[i + 1] * x0 + noise[i + 1] / noise[i] * (x - signal[i] * x0)
    return x


class GaussianDiffusion(nn.Module):
    """Training loss and sampling around a network.

    model: any callable (x (b, c, f, h, w), t (b) integers in [0, steps)) -> (b, c, f, h, w), which also takes cond and
    keep (see `Condition`) if it is to be conditional. steps: of the cosine schedule [6] with offset 0.008 and
    beta <= 0.9999. target: "eps", "v" or "x0". clip: guesses are kept in [-1, 1], as pixels are.
    Raises ValueError for an unknown target or steps < 1. Needs: ddim.
    """

    def __init__(self, model, steps=256, target="eps", clip=True):
        super().__init__()
        if steps < 1:
            raise ValueError(f"a schedule of {steps} steps: choose 1 or more")
        if target not in ("eps", "v", "x0"):
            raise ValueError(f"unknown target {target!r}: choose eps, v or x0")
        self.model, self.steps, self.target, self.clip = model, steps, target, clip
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        beta = (1 - (angle[1:].cos() / angle[:-1].cos()).square()).clamp(max=0.9999)
        alpha_bar = torch.cumprod(1 - beta, dim=0)
        # Both roots from float64: 1 - alpha_bar would lose the first steps, where it is 1e-4, to float32's rounding.
        self.register_buffer("signal_rate", alpha_bar.sqrt().float(), persistent=False)  # (steps)
        self.register_buffer("noise_rate", (1 - alpha_bar).sqrt().float(), persistent=False)

    def rates(self, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), to multiply videos.    t (b) -> two of (b, 1, 1, 1, 1)"""
        return self.signal_rate[t].view(-1, 1, 1, 1, 1), self.noise_rate[t].view(-1, 1, 1, 1, 1)

    def losses(self, x0, t=None, eps=None, cond=None, keep=None):
        """Mean squared error for each video.    x0 (b, c, f, h, w) in [-1, 1], t (b), eps like x0 -> (b)

        cond (b, cond_dim) is shown where keep (b) is True: guidance needs a network that also knows to do without.
        t, eps and keep are drawn unless given, keep with probability 0.9.
        """
        t = torch.randint(self.steps, (len(x0),), device=x0.device) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        signal, noise = self.rates(t)
        target = {"eps": eps, "x0": x0, "v": signal * eps - noise * x0}[self.target]
        keep = torch.rand(len(x0), device=x0.device) < 0.9 if keep is None else keep
        out = self.model(signal * x0 + noise * eps, t, *(() if cond is None else (cond, keep)))
        return (out.to(x0.dtype) - target).square().mean((1, 2, 3, 4))

    def loss(self, *args, **kwargs):
        """The mean of `losses`, with the same arguments.    -> scalar"""
        return self.losses(*args, **kwargs).mean()

    def predict_x0(self, x, t, cond=None):
        """The network's guess of the video.    x (b, c, f, h, w), t (b), cond (b, cond_dim) -> x0, not clipped"""
        signal, noise = self.rates(t)
        out = self.model(x, t, *(() if cond is None else (cond,))).to(x.dtype)
        return {"eps": (x - noise * out) / signal, "x0": out, "v": signal * x - noise * out}[self.target]

    def guided_x0(self, x, t, cond=None, guidance=1.0):
        """The guess, moved on from the one without the condition [13], and clipped. Arguments as in `predict_x0`.

        guidance: 0 is the guess without the condition, 1 the one with it, more exaggerates the difference. Each target
        is linear in the guess: it makes no difference which of them is extrapolated.
        """
        x0 = self.predict_x0(x, t, None if guidance == 0 else cond)
        if cond is not None and guidance not in (0, 1):
            null = self.predict_x0(x, t)
            x0 = null + guidance * (x0 - null)
        return x0.clamp(-1, 1) if self.clip else x0

    @torch.no_grad()
    def sample(self, x, steps=None, sampler=ddim, cond=None, guidance=1.0, progress=iter):
        """Turn noise into videos.    x (b, c, f, h, w) standard normal -> (b, c, f, h, w), in [-1, 1] if clipped

        steps: how many of the schedule's steps are visited, evenly spaced; all by default. sampler: ddim, dpm_solver
        or any function like them; partial(ddim, eta=1.0) is DDPM. cond (b, cond_dim), guidance: see `guided_x0`.
        progress: wraps the range of steps, e.g. tqdm. Raises ValueError for steps outside 1..self.steps.
        """
        steps = self.steps if steps is None else steps
        if not 1 <= steps <= self.steps:
            raise ValueError(f"cannot sample in {steps} steps: choose 1 to {self.steps}, the steps of the schedule")
        visited = torch.linspace(self.steps - 1, 0, steps, dtype=torch.float64).round().long().tolist()
        signal, noise = [*self.signal_rate[visited].tolist(), 1.0], [*self.noise_rate[visited].tolist(), 0.0]
        denoise = lambda x, t: self.guided_x0(x, torch.full((len(x),), t, device=x.device), cond, guidance)
        return sampler(denoise, x, visited, signal, noise, progress=progress)


# -----------------------------------------------------------------------------
# 8. DiM
#
# A network without attention and without a U-Net's levels [15]: frames are cut into patches of p x p pixels, each
# patch becomes a token, and all tokens of a clip, frame after frame and row after row in a frame, form one sequence for
# Mamba blocks that run both ways. The cost is linear in the number of tokens, of an image (f = 1) as of a video.
#
# [15] leaves open how the step and the condition enter, and its sizes. Here they enter as in DiT [16], by adaLN-zero:
# they scale and shift what a block sees, and gate what it adds, with gates that are closed at first (the last norm,
# which they scale and shift in DiT as well, is plain). DIM_SIZES are those of DiT: an assumption.

DIM_SIZES = {
    "S": dict(depth=12, d=384), "B": dict(depth=12, d=768), "L": dict(depth=24, d=1024), "XL": dict(depth=28, d=1152),
}  # fmt: skip


class DiMBlock(nn.Module):
    """x + gate * mamba(scale * norm(x) + shift).    x (b, l, d), emb (b, d_emb) -> (b, l, d)

    The identity at first, whatever emb is: adaLN-zero [16]. Needs: MambaBlock, S6.
    """

    def __init__(self, d, d_emb, n=16):
        super().__init__()
        self.to_modulation = nn.Linear(d_emb, 3 * d)
        self.norm = nn.LayerNorm(d, elementwise_affine=False)
        self.mamba = MambaBlock(partial(S6, n=n), d)
        nn.init.zeros_(self.to_modulation.weight)
        nn.init.zeros_(self.to_modulation.bias)

    def forward(self, x, emb):
        scale, shift, gate = rearrange(self.to_modulation(F.silu(emb)), "b (three d) -> three b 1 d", three=3)
        return x + gate * self.mamba(self.norm(x) * (scale + 1) + shift)


class DiM(nn.Module):
    """Network of Mamba blocks.    x (b, c, f, h, w), t (b) integers, cond (b, cond_dim) -> (b, c_out, f, h, w)

    patch: side of a patch in pixels; d: width, a multiple of 8 from 16 on; depth: number of blocks, DIM_SIZES names
    some; n: state size. channels, out_channels: of the videos. cond_dim, cond, keep: see `Condition`. recompute: as in
    UNet3D. Frames, height and width are free. Its output is 0 at first. Raises ValueError for another d, and in
    `forward` for a height or width that is not a multiple of `factor`, which is the patch. Source: [15], [16].
    """

    def __init__(self, patch=2, d=384, depth=12, n=16, channels=3, out_channels=None, cond_dim=None, recompute=False):
        super().__init__()
        if d < 16 or d % 8:
            raise ValueError(f"a width of {d}: choose a multiple of 8 from 16 on, of which positions take their shares")
        self.d, self.factor = d, patch
        self.patch_in = nn.Linear(channels * patch**2, d)
        self.embed = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))
        self.condition = Condition(cond_dim)
        self.blocks = nn.ModuleList(DiMBlock(d, d + (cond_dim or 0), n) for _ in range(depth))
        self.norm = nn.LayerNorm(d)
        self.patch_out = nn.Linear(d, (out_channels or channels) * patch**2)
        nn.init.zeros_(self.patch_out.weight)
        nn.init.zeros_(self.patch_out.bias)
        for block in self.blocks if recompute else []:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def position(self, *size):
        """Sinusoids: half of the features tell the frame, a quarter each the row and the column.    -> (f, h, w, d)"""
        shares = self.d // 2, self.d // 4, self.d // 4
        at = [step_embedding(torch.arange(k, device=self.norm.weight.device), d) for k, d in zip(size, shares)]
        return torch.cat([
            at[0][:, None, None].expand(*size, -1), at[1][:, None].expand(*size, -1), at[2].expand(*size, -1),
        ], dim=-1)  # fmt: skip

    def forward(self, x, t, cond=None, keep=None):
        f, (h, w), p = x.shape[2], x.shape[-2:], self.factor
        if h % p or w % p:
            raise ValueError(f"frames of {h}x{w} pixels: height and width must be multiples of the patch, {p}")
        emb = self.embed(step_embedding(t, self.d).to(x.dtype))
        emb = self.condition(emb, cond, keep)  # (b, d + cond_dim)
        x = self.patch_in(rearrange(x, "b c f (h p) (w q) -> b f h w (c p q)", p=p, q=p))  # (b, f, h/p, w/p, d)
        x = x + self.position(*x.shape[1:4]).to(x.dtype)
        x = rearrange(x, "b f h w d -> b (f h w) d")
        for block in self.blocks:
            x = block(x, emb)
        x = self.patch_out(self.norm(x))
        return rearrange(x, "b (f h w) (c p q) -> b c f (h p) (w q)", f=f, h=h // p, p=p, q=p)


# -----------------------------------------------------------------------------
# python vdm_ssm.py


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors alive inside a `with` block on a CPU; `peak` is their maximum."""

    def __enter__(self):
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()
        return super().__enter__()

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out


def relative_error(value, reference):
    """Relative L2 distance.    two tensors of one shape -> float"""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()


def check_scan(l=100, d=32, n=16):
    """Print how far `selective_scan` in float32 is from the loop in float64, for the output and every gradient."""
    dt = torch.exp(torch.empty(4, l, d, dtype=torch.float64).uniform_(math.log(1e-4), math.log(10)))
    A = -torch.arange(1.0, n + 1, dtype=torch.float64).repeat(d, 1)
    u, B, C, D = (torch.randn(*s, dtype=torch.float64) for s in ((4, l, d), (4, l, n), (4, l, n), (d,)))
    exact = [x.requires_grad_() for x in (u, dt, A, B, C, D)]
    fast = [x.detach().float().requires_grad_() for x in exact]
    y, y_fast = selective_scan_loop(*exact), selective_scan(*fast)
    dy = torch.randn_like(y)
    y.backward(dy)
    y_fast.backward(dy.float())
    errors = {"y": relative_error(y_fast, y)}
    errors |= {"d" + name: relative_error(f.grad, e.grad) for name, f, e in zip("u dt A B C D".split(), fast, exact)}
    print(f"selective_scan in float32 against selective_scan_loop in float64, {l} frames, relative L2 error:")
    print("  " + "   ".join(f"{name} {error:.0e}" for name, error in errors.items()))


def check_s4d(l=100, d=32):
    """Print how far S4D's convolution is from its recurrence."""
    layer, u = S4D(d), torch.randn(2, l, d)
    state, ys = layer.initial_state(2), []
    for u_k in u.unbind(1):
        y_k, state = layer.step(u_k, state)
        ys.append(y_k)
    print(f"S4D as a convolution against S4D step by step: {relative_error(layer(u), torch.stack(ys, 1)):.0e}")


def table(title, layers, shapes, call=lambda layer, x: layer(x)):
    """Print parameters, and time and peak memory of forward + backward, of each layer.

    layers: by name; shapes: by the column's title, of the input; call(layer, input): runs a layer.
    """
    print(f"\n{title}, forward + backward, float32, CPU: ms | peak MB")
    print(f"{'':17s}{'parameters':>11s}" + "".join(f"{column:>18s}" for column in shapes))
    for name, layer in layers.items():
        row = f"{name:17s}{sum(p.numel() for p in layer.parameters()):11,d}"
        for shape in shapes.values():
            x = torch.randn(shape, requires_grad=True)
            with PeakMemory() as memory:  # also warms up
                call(layer, x).sum().backward()
            start = time.perf_counter()
            call(layer, x).sum().backward()
            row += f"{1e3 * (time.perf_counter() - start):10.1f} |{memory.peak / 2**20:6.1f}"
        print(row, flush=True)


def table_of_layers(names=TEMPORAL_LAYERS[:13], pixels=8, d=64):
    """The papers' temporal layers; the other names are forward-only ablations."""
    layers = {name: temporal_layer(name)(d) for name in names}
    shapes = {f"{f} frames": (pixels, f, d) for f in (16, 64, 256)}
    table(f"One temporal layer, {pixels} pixels, width {d}, 8 heads", layers, shapes)


def table_of_dim(d=64):
    """A block of DiM beside a transformer's: attention to all tokens of a clip, and an MLP."""
    transformer = nn.TransformerEncoderLayer(d, 8, 4 * d, dropout=0.0, batch_first=True, norm_first=True)
    layers, emb = {"DiM": DiMBlock(d, d), "transformer": transformer}, torch.randn(1, d)
    nn.init.normal_(layers["DiM"].to_modulation.weight, std=0.02)  # else the gates are closed
    shapes = {f"{l} tokens": (1, l, d) for l in (256, 1024, 4096)}
    call = lambda layer, x: layer(x, emb) if isinstance(layer, DiMBlock) else layer(x)
    table(f"One block of a network of tokens, width {d}, 8 heads", layers, shapes, call)


if __name__ == "__main__":
    torch.manual_seed(0)
    check_scan()
    check_s4d()
    table_of_layers()
    table_of_dim()
