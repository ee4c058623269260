"""One formula for GELU without erf, spelt twice: in MLX operations and in Metal.

The normal distribution's Phi(x) - 1/2 = x P(x^2) / Q(x^2) for |x| <= LIMIT, fitted by weighted
least squares to 7e-9. In float32 the error of GELU is at most 2.0e-7 max(1, |x|), against 1.1e-7
with the library's erf. A NaN stays one; below -LIMIT, -inf included, |GELU| < 4e-7.
"""

import mlx.core as mx

LIMIT = 5.5
P = (0.39894217, 0.034067154, 0.004691354, 0.00017118719, 6.384879e-06, 2.2675886e-08)
Q = (1.0, 0.2520591, 0.028771328, 0.0018974792, 7.449918e-05, 1.197843e-06)


def normal_gelu(x: mx.array) -> mx.array:
    """GELU of a float32 array; to be compiled, or it is thirty passes over memory.

    The clamps are selections against a bound that the compiler cannot see (a slice of an array):
    against a literal, or with mx.minimum, g++ makes branches and does not vectorise the loop.
    """
    bound = mx.broadcast_to(mx.array([LIMIT, 0.0])[0], x.shape)
    low = mx.where(x < -bound, -bound, x)
    t = mx.where(low > bound, bound, low)
    u = x * x
    u = mx.where(u > bound * bound, bound * bound, u)
    u2 = u * u
    u4 = u2 * u2  # Estrin's scheme: mx.compile fuses at most 11 levels
    p = ((P[0] + P[1] * u) + (P[2] + P[3] * u) * u2) + (P[4] + P[5] * u) * u4
    q = ((Q[0] + Q[1] * u) + (Q[2] + Q[3] * u) * u2) + (Q[4] + Q[5] * u) * u4
    return low * (0.5 + t * p / q)


def _horner(coefficients: tuple[float, ...]) -> str:
    text = f"float4({coefficients[-1]!r}f)"
    for c in reversed(coefficients[:-1]):
        text = f"fma({text}, u, float4({c!r}f))"
    return text


# Selections here too, because Metal's min, max and clamp drop a NaN.
METAL = f"""
inline float4 fastvlm_gelu(float4 x) {{
  const float4 bound = float4({LIMIT!r}f);
  const float4 low = select(x, -bound, x < -bound);
  const float4 t = select(low, bound, low > bound);
  const float4 u = t * t;
  const float4 p = {_horner(P)};
  const float4 q = {_horner(Q)};
  return low * (float4(0.5f) + t * metal::fast::divide(p, q));
}}
"""
