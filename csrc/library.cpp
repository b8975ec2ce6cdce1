// Schemas of the raw launchers, and the empty Python module whose import registers them.
//
// A launcher has the name and the signature of its twin in sami_fast/reference; it stands below autograd and knows nothing of it. Python
// checks the arguments first; what a launcher checks itself is a second guard.

#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sami_fast_C, m) {
  m.def("random_normal(int seed, int step, int stream, Tensor index, int size) -> Tensor");
  m.def("random_uniform(int seed, int step, int stream, Tensor index, int size) -> Tensor");
  m.def("stratified_uniform(Tensor index, int levels, int global_batch, *, int seed, int step) -> Tensor");
  m.def(
      "noise_sample_fwd(Tensor x_0, Tensor alpha_t, Tensor sigma_t, Tensor index, int seed, int step, int stream, bool store_eps) "
      "-> (Tensor, Tensor)");
  m.def(
      "guided_loss_fwd(Tensor? eps, Tensor eps_pred, Tensor grad_log_q, Tensor sigma_t, Tensor weight, Tensor unconditional_weight, "
      "Tensor? index, int levels, int seed, int step, int stream) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("gaussian_log_prob_fwd(Tensor z, Tensor mu, Tensor var) -> Tensor");
  m.def("gaussian_log_prob_bwd(Tensor grad, Tensor z, Tensor mu, Tensor var) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gaussian_log_prob_bwd_bwd(Tensor? ggz, Tensor? ggmu, Tensor? ggvar, Tensor grad, Tensor z, Tensor mu, Tensor var) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_fwd(Tensor x, Tensor weight, Tensor bias, int num_groups, float norm_eps, bool silu) -> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_bwd(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int num_groups, bool silu) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "group_norm_silu_tan(Tensor tx, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int num_groups, bool silu) -> Tensor");
  m.def(
      "group_norm_silu_bwd_bwd(Tensor ggx, Tensor? ggweight, Tensor? ggbias, Tensor grad_y, Tensor x, Tensor weight, Tensor bias, "
      "Tensor mean, Tensor rstd, int num_groups, bool silu, Tensor? y_bar, bool need_tangent) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> (Tensor, Tensor)");
  m.def(
      "attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, bool causal) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_tan(Tensor tq, Tensor tk, Tensor tv, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, bool causal) "
      "-> (Tensor, Tensor)");
  m.def(
      "attention_bwd_bwd(Tensor ggq, Tensor ggk, Tensor ggv, Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor tout, Tensor tau, float scale, bool causal, Tensor? out_bar) -> (Tensor, Tensor, Tensor)");
  m.def("conv2d_fwd(Tensor x, Tensor weight, Tensor? bias, int stride, int padding) -> Tensor");
  m.def("conv2d_bwd_input(Tensor grad_y, Tensor weight, int stride, int padding, int height, int width) -> Tensor");
  m.def("conv2d_bwd_weight(Tensor grad_y, Tensor x, bool with_bias, int stride, int padding, int size) -> (Tensor, Tensor)");
  m.def(
      "yuv_to_rgb(Tensor y, Tensor u, Tensor v, int top, int left, int side, int size, float red_weight, float blue_weight, bool full_range) "
      "-> Tensor");
}

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "Registers torch.ops.sami_fast_C.", -1, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
