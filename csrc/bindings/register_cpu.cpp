// Bindings of the cpu backend: builds argument structs from Python arguments. No torch here; pointers are trusted.
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/isa.h"
#include "register.h"

namespace py = pybind11;
using acqcore::DType;
using acqcore::Isa;
using acqcore::Matrix;

namespace {

DType dtype_from(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got " + name);
}

Matrix make_matrix(uintptr_t pointer, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                   const std::string& dtype) {
  return {reinterpret_cast<const void*>(pointer), rows, columns, row_stride, column_stride, dtype_from(dtype)};
}

const acqcore::Operations& operations(const std::string& name) {
  const Isa* isa = acqcore::find_isa(name.c_str());
  if (isa == nullptr || !isa->supported()) {
    throw std::invalid_argument("isa: " + name + " is not available on this processor");
  }
  return *isa->operations;
}

std::vector<std::pair<std::string, std::string>> list_isas() {
  int count = 0;
  const Isa* all = acqcore::isas(&count);
  std::vector<std::pair<std::string, std::string>> rows;
  for (int i = 0; i < count; ++i) rows.emplace_back(all[i].name, all[i].supported() ? "" : "this processor lacks it");
  return rows;
}

std::string best_isa() {
  const Isa* isa = acqcore::best_isa();
  if (isa == nullptr) throw std::runtime_error("acqcore needs a processor with x86-64-v2 (SSE4.2) or later");
  return isa->name;
}

acqcore::HeadArgs head_args(int threads, const Matrix& hidden, const Matrix& weight, uintptr_t bias, uintptr_t targets,
                            float softcap, float scale, float temperature, int64_t vocab_start) {
  return {threads,
          hidden,
          weight,
          reinterpret_cast<const float*>(bias),
          reinterpret_cast<const int64_t*>(targets),
          softcap,
          scale,
          temperature,
          vocab_start};
}

template <typename Args>
void run(const std::string& isa, bool (*acqcore::Operations::*operation)(const Args&), const Args& args) {
  const acqcore::Operations& ops = operations(isa);
  py::gil_scoped_release release;
  if (!(ops.*operation)(args)) throw std::bad_alloc();
}

void row_stats(const std::string& isa, const acqcore::HeadArgs& head, uintptr_t bounds, int64_t samples,
               uintptr_t products, uintptr_t state, uintptr_t index) {
  const acqcore::GramArgs gram = {reinterpret_cast<const int64_t*>(bounds), samples,
                                  reinterpret_cast<float*>(products)};
  const acqcore::RowStatsArgs args = {head, gram, {}, reinterpret_cast<double*>(state),
                                      reinterpret_cast<int64_t*>(index)};
  run(isa, &acqcore::Operations::row_stats, args);
}

void delta_hash(const std::string& isa, const acqcore::HeadArgs& head, uintptr_t state, uintptr_t index,
                uintptr_t places, int64_t columns, uintptr_t out) {
  const acqcore::DeltaHashArgs args = {head,
                                       reinterpret_cast<const double*>(state),
                                       reinterpret_cast<const int64_t*>(index),
                                       reinterpret_cast<const int32_t*>(places),
                                       columns,
                                       reinterpret_cast<float*>(out)};
  run(isa, &acqcore::Operations::delta_hash, args);
}

void hash_columns(const std::string& isa, int threads, uintptr_t values, int64_t rows, int64_t columns,
                  uintptr_t places, int64_t dim, uintptr_t out) {
  const acqcore::HashColumnsArgs args = {threads,
                                         reinterpret_cast<const float*>(values),
                                         rows,
                                         columns,
                                         reinterpret_cast<const int32_t*>(places),
                                         dim,
                                         reinterpret_cast<float*>(out)};
  run(isa, &acqcore::Operations::hash_columns, args);
}

void head_grad_norm(const std::string& isa, const acqcore::HeadArgs& head, uintptr_t state, uintptr_t index,
                    uintptr_t bounds, int64_t samples, uintptr_t weights, uintptr_t squared) {
  const acqcore::HeadGradNormArgs args = {head,
                                          reinterpret_cast<const double*>(state),
                                          reinterpret_cast<const int64_t*>(index),
                                          reinterpret_cast<const int64_t*>(bounds),
                                          samples,
                                          reinterpret_cast<const double*>(weights),
                                          reinterpret_cast<double*>(squared)};
  run(isa, &acqcore::Operations::head_grad_norm, args);
}

void delta_sums(const std::string& isa, const acqcore::HeadArgs& head, uintptr_t bounds, int64_t samples,
                uintptr_t products, uintptr_t state, uintptr_t index, uintptr_t values, uintptr_t places,
                int64_t columns, uintptr_t hashed) {
  const acqcore::GramArgs gram = {reinterpret_cast<const int64_t*>(bounds), samples,
                                  reinterpret_cast<float*>(products)};
  const acqcore::DeltaSumsArgs args = {head,
                                       gram,
                                       reinterpret_cast<double*>(state),
                                       reinterpret_cast<int64_t*>(index),
                                       reinterpret_cast<float*>(values),
                                       reinterpret_cast<const int32_t*>(places),
                                       columns,
                                       reinterpret_cast<float*>(hashed)};
  run(isa, &acqcore::Operations::delta_sums, args);
}

void fisher_sums(const std::string& isa, const acqcore::HeadArgs& head, uintptr_t state, uintptr_t index, int probes,
                 uint64_t seed, uintptr_t samples, uintptr_t positions, uintptr_t sums, uintptr_t signed_sums,
                 uintptr_t squares) {
  const acqcore::FisherSumsArgs args = {head,
                                        reinterpret_cast<double*>(state),
                                        reinterpret_cast<int64_t*>(index),
                                        probes,
                                        seed,
                                        reinterpret_cast<const int64_t*>(samples),
                                        reinterpret_cast<const int64_t*>(positions),
                                        reinterpret_cast<float*>(sums),
                                        reinterpret_cast<double*>(signed_sums),
                                        reinterpret_cast<double*>(squares)};
  run(isa, &acqcore::Operations::fisher_sums, args);
}

void gram_norm(const std::string& isa, const acqcore::HeadArgs& head, uintptr_t state, uintptr_t index, uintptr_t bounds,
               int64_t samples, uintptr_t products, uintptr_t local_max, uintptr_t weights, uintptr_t squared) {
  const acqcore::GramArgs gram = {reinterpret_cast<const int64_t*>(bounds), samples,
                                  reinterpret_cast<float*>(products)};
  const acqcore::GramNormArgs args = {head,
                                      reinterpret_cast<const double*>(state),
                                      reinterpret_cast<const int64_t*>(index),
                                      gram,
                                      reinterpret_cast<const double*>(local_max),
                                      reinterpret_cast<const double*>(weights),
                                      reinterpret_cast<double*>(squared)};
  run(isa, &acqcore::Operations::gram_norm, args);
}

acqcore::Dropout make_dropout(const std::string& form, int64_t block, uint32_t threshold, float inverse_keep,
                              uint64_t seed, uintptr_t samples, uintptr_t positions) {
  const acqcore::Draws draws = form == "element" ? acqcore::Draws::kElement : acqcore::Draws::kBlock;
  return {draws,
          block,
          threshold,
          inverse_keep,
          seed,
          reinterpret_cast<const int64_t*>(samples),
          reinterpret_cast<const int64_t*>(positions)};
}

void mixture_stats(const std::string& isa, const acqcore::HeadArgs& head, int64_t rows, int draws,
                   const acqcore::Dropout* dropout, const std::vector<Matrix>& weights,
                   const std::vector<uintptr_t>& biases, uintptr_t state, uintptr_t votes, uintptr_t bounds,
                   int64_t samples, uintptr_t products, uintptr_t row_state, uintptr_t row_index) {
  std::vector<const float*> bias_pointers;
  for (const uintptr_t bias : biases) bias_pointers.push_back(reinterpret_cast<const float*>(bias));
  const acqcore::MixtureStatsArgs args = {head,
                                          rows,
                                          draws,
                                          dropout ? *dropout : acqcore::Dropout{},
                                          static_cast<int>(weights.size()),
                                          weights.data(),
                                          bias_pointers.data(),
                                          reinterpret_cast<double*>(state),
                                          reinterpret_cast<int64_t*>(votes),
                                          {reinterpret_cast<const int64_t*>(bounds), samples,
                                           reinterpret_cast<float*>(products)},
                                          reinterpret_cast<double*>(row_state),
                                          reinterpret_cast<int64_t*>(row_index)};
  run(isa, &acqcore::Operations::mixture_stats, args);
}

void dropout_mask(const std::string& isa, int threads, const acqcore::Dropout& dropout, int site, int64_t rows,
                  int draws, int64_t units, uintptr_t keep) {
  run(isa, &acqcore::Operations::dropout_mask,
      acqcore::DropoutMaskArgs{threads, dropout, site, rows, draws, units, reinterpret_cast<bool*>(keep)});
}

void logit_stats(const std::string& isa, int threads, const Matrix& logits, uintptr_t targets, float temperature,
                 uintptr_t state, uintptr_t index) {
  const acqcore::LogitStatsArgs args = {threads,
                                        logits,
                                        reinterpret_cast<const int64_t*>(targets),
                                        temperature,
                                        reinterpret_cast<double*>(state),
                                        reinterpret_cast<int64_t*>(index)};
  run(isa, &acqcore::Operations::logit_stats, args);
}

}  // namespace

void register_cpu(py::module_& m) {
  py::class_<Matrix>(m, "Matrix")
      .def(py::init(&make_matrix), py::arg("pointer"), py::arg("rows"), py::arg("columns"), py::arg("row_stride"),
           py::arg("column_stride"), py::arg("dtype"));
  m.def("isas", &list_isas);
  m.def("best_isa", &best_isa);
  py::class_<acqcore::HeadArgs>(m, "HeadArgs")
      .def(py::init(&head_args), py::arg("threads"), py::arg("hidden"), py::arg("weight"), py::arg("bias"),
           py::arg("targets"), py::arg("softcap"), py::arg("scale"), py::arg("temperature"), py::arg("vocab_start"));
  m.def("row_stats", &row_stats, py::arg("isa"), py::arg("head"), py::arg("bounds"), py::arg("samples"),
        py::arg("products"), py::arg("state"), py::arg("index"));
  m.def("delta_hash", &delta_hash, py::arg("isa"), py::arg("head"), py::arg("state"), py::arg("index"),
        py::arg("places"), py::arg("columns"), py::arg("out"));
  m.def("hash_columns", &hash_columns, py::arg("isa"), py::arg("threads"), py::arg("values"), py::arg("rows"),
        py::arg("columns"), py::arg("places"), py::arg("dim"), py::arg("out"));
  m.def("fisher_sums", &fisher_sums, py::arg("isa"), py::arg("head"), py::arg("state"), py::arg("index"),
        py::arg("probes"), py::arg("seed"), py::arg("samples"), py::arg("positions"), py::arg("sums"),
        py::arg("signed_sums"), py::arg("squares"));
  m.def("delta_sums", &delta_sums, py::arg("isa"), py::arg("head"), py::arg("bounds"), py::arg("samples"),
        py::arg("products"), py::arg("state"), py::arg("index"), py::arg("values"), py::arg("places"),
        py::arg("columns"), py::arg("hashed"));
  m.def("gram_norm", &gram_norm, py::arg("isa"), py::arg("head"), py::arg("state"), py::arg("index"), py::arg("bounds"),
        py::arg("samples"), py::arg("products"), py::arg("local_max"), py::arg("weights"), py::arg("squared"));
  m.def("head_grad_norm", &head_grad_norm, py::arg("isa"), py::arg("head"), py::arg("state"), py::arg("index"),
        py::arg("bounds"), py::arg("samples"), py::arg("weights"), py::arg("squared"));
  py::class_<acqcore::Dropout>(m, "Dropout")
      .def(py::init(&make_dropout), py::arg("form"), py::arg("block"), py::arg("threshold"), py::arg("inverse_keep"),
           py::arg("seed"), py::arg("samples"), py::arg("positions"));
  m.def("dropout_mask", &dropout_mask, py::arg("isa"), py::arg("threads"), py::arg("dropout"), py::arg("site"),
        py::arg("rows"), py::arg("draws"), py::arg("units"), py::arg("keep"));
  m.def("mixture_stats", &mixture_stats, py::arg("isa"), py::arg("head"), py::arg("rows"), py::arg("draws"),
        py::arg("dropout").none(true), py::arg("weights"), py::arg("biases"), py::arg("state"), py::arg("votes"),
        py::arg("bounds"), py::arg("samples"), py::arg("products"), py::arg("row_state"), py::arg("row_index"));
  m.def("logit_stats", &logit_stats, py::arg("isa"), py::arg("threads"), py::arg("logits"), py::arg("targets"),
        py::arg("temperature"), py::arg("state"), py::arg("index"));
}
