// Activations and their derivatives, a row at a time; the definitions are those of torch.nn.functional and transformers.
#include "activations.h"

namespace bigmodel::BIGMODEL_ISA {

namespace {

// The logistic function with its complement, which does not cancel where the first is near 1: both from e^-v.
struct Logistic { F32 value, complement; };
BIGMODEL_INLINE Logistic logistic(F32 v) {
  const F32 e = exp(-v), value = F32::set(1.0f) / (F32::set(1.0f) + e);
  return {value, e * value};
}

template <Activation A>
BIGMODEL_INLINE F32 activate(F32 x) {
  if constexpr (A == Activation::gelu) {  // x Phi(x) = max(x, 0) - |x| tail(|x|), which cancels nowhere; beyond 7 the tail is nothing
    const F32 t = min(F32::set(7.0f), abs(x));
    return max(F32::zero(), x) - t * normal_tail(t);
  }
  // 0.5 x (1 + tanh u) = x sigmoid(2u), which does not cancel; u = sqrt(2/pi) (x + 0.044715 x^3). Hendrycks & Gimpel, arXiv 1606.08415.
  if constexpr (A == Activation::gelu_tanh) return x * sigmoid(x * fma(x * x, F32::set(0.0713548163f), F32::set(1.59576912f)));
  if constexpr (A == Activation::quick_gelu) return x * sigmoid(F32::set(1.702f) * x);
  if constexpr (A == Activation::relu) return max(F32::zero(), x);
  if constexpr (A == Activation::silu) return x * sigmoid(x);
  return x;
}

// d activate(x) / dx. Beyond the clamps the derivative is 0 or 1 in float32, and infinities make no NaN; a NaN stays one.
template <Activation A>
BIGMODEL_INLINE F32 derivative(F32 x) {
  if constexpr (A == Activation::gelu) {  // Phi(x) + x phi(x) = [x > 0] - sign(x) (tail(t) - t phi(t)), t = |x|
    const F32 t = min(F32::set(7.0f), abs(x));
    const F32 density = F32::set(0.398942280f) * exp2(t * t * F32::set(-0.721347520f));
    const F32 below = normal_tail(t) - t * density;
    return select_less(x, F32::zero(), below, F32::set(1.0f) - below);
  }
  if constexpr (A == Activation::gelu_tanh) {  // s + x s (1 - s) v', s = sigmoid(v), v = x (1.5957 + 0.07135 x^2)
    const F32 t = max(F32::set(-15.0f), min(F32::set(15.0f), x)), square = t * t;
    const Logistic s = logistic(t * fma(square, F32::set(0.0713548163f), F32::set(1.59576912f)));
    return fma(t * s.value * s.complement, fma(square, F32::set(0.214064449f), F32::set(1.59576912f)), s.value);
  }
  if constexpr (A == Activation::quick_gelu || A == Activation::silu) {  // s + v s (1 - s), v = x or 1.702 x
    const F32 v = max(F32::set(-80.0f), min(F32::set(80.0f), A == Activation::silu ? x : F32::set(1.702f) * x));
    const Logistic s = logistic(v);
    return fma(v * s.value, s.complement, s.value);
  }
  if constexpr (A == Activation::relu) return select_less(F32::zero(), x, F32::set(1.0f), F32::zero());
  return F32::set(1.0f);
}

// Calls body(Tag) with Tag::value the activation: from the run-time name to a template's argument.
template <Activation A> struct ActivationTag { static constexpr Activation value = A; };
template <class Body>
BIGMODEL_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::none: return body(ActivationTag<Activation::none>());
    case Activation::gelu: return body(ActivationTag<Activation::gelu>());
    case Activation::gelu_tanh: return body(ActivationTag<Activation::gelu_tanh>());
    case Activation::quick_gelu: return body(ActivationTag<Activation::quick_gelu>());
    case Activation::relu: return body(ActivationTag<Activation::relu>());
    case Activation::silu: return body(ActivationTag<Activation::silu>());
  }
}

}  // namespace

void activate_row(Activation activation, const float* x, int64_t n, float* out) {
  auto apply = [&](auto tag) {
    each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(activate<decltype(tag)::value>(load(x + i, here)), out + i, here); });
  };
  with_activation(activation, apply);
}

void derivative_row(Activation activation, const float* x, int64_t n, float* out) {
  auto apply = [&](auto tag) {
    each_vector(n, [&](int64_t i, int here) __attribute__((always_inline)) { store(derivative<decltype(tag)::value>(load(x + i, here)), out + i, here); });
  };
  with_activation(activation, apply);
}

}  // namespace bigmodel::BIGMODEL_ISA
