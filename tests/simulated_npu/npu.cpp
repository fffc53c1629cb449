// A device in the CPU's memory that torch takes for an accelerator, for tests alone.
//
// Memory, copies, views, streams, convolutions and autocast are the device's own; every other operator is computed by
// the CPU, on copies. So a tensor of the device and one of the CPU can't be mixed, as on a real one. It shows that
// devices are chosen and kept, not that an NPU has a kernel, its rounding, HCCL's ordering or its memory.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/InferSize.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>

namespace {

using at::IntArrayRef;
using at::Tensor;
using std::optional;

constexpr auto kDevice = c10::DeviceType::PrivateUse1;
constexpr int kMostDevices = 16;
int num_devices = 2;
thread_local c10::DeviceIndex current = 0;
bool refuses_fp64 = true;  // NPUs' kernels have none

c10::DeviceIndex index_of(c10::Device device) {
  return device.has_index() ? device.index() : current;
}

// -- memory --

std::atomic<int64_t> allocated{0}, peak{0};

struct Block {
  void* data;
  int64_t size;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated -= block->size;
  c10::free_cpu(block->data);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = size ? c10::alloc_cpu(size) : nullptr;
    const int64_t now = allocated += static_cast<int64_t>(size);
    int64_t before = peak.load();
    while (now > before && !peak.compare_exchange_weak(before, now)) {
    }
    return {data, new Block{data, static_cast<int64_t>(size)}, &free_block, c10::Device(kDevice, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    std::memcpy(to, from, size);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(kDevice, &allocator);

// -- devices and streams: all work is done when a call returns --

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kDevice;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before(kDevice, current);
    current = index_of(device);
    return before;
  }
  c10::Device getDevice() const override {
    return c10::Device(kDevice, current);
  }
  void setDevice(c10::Device device) const override {
    current = index_of(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current = index_of(device);
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return static_cast<c10::DeviceIndex>(num_devices);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kDevice, index_of(device)));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return getStream(device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = nullptr;
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void*, void*, const c10::DeviceIndex) const override {
    return 0;
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return num_devices > 0;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return static_cast<c10::DeviceIndex>(num_devices);
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current;
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    current = index;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return std::exchange(current, index);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index < 0 ? current : std::exchange(current, index);
  }
  at::Device getDeviceFromPtr(void*) const override {
    return at::Device(kDevice, current);
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return c10::GetAllocator(at::kCPU);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto data = allocator.allocate(size);
    std::memcpy(data.get(), storage.data(), std::min(size, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(data));
    storage.set_nbytes(size);
  }
};

const bool are_hooks_registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// -- random numbers: every device has a generator, of the CPU's kind --

at::Generator& generator(int64_t device) {
  static std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (int i = 0; i < kMostDevices; ++i)
      made.push_back(at::make_generator<at::CPUGeneratorImpl>());
    return made;
  }();
  return all.at(device);
}

// While it lives, the CPU's kernels draw from the device's generator.
struct DeviceDraws {
  at::Generator cpu = at::detail::getDefaultCPUGenerator(), device = generator(current);
  Tensor before = cpu.get_state();

  DeviceDraws() {
    cpu.set_state(device.get_state());
  }
  ~DeviceDraws() {
    device.set_state(cpu.get_state());
    cpu.set_state(before);
  }
};

void compute_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  for (const auto& argument : torch::jit::last(*stack, op.schema().arguments().size()))
    TORCH_CHECK(!argument.isGenerator(), op.schema().name(), ": a generator of another device can't draw on npu");
  optional<DeviceDraws> draws;
  if (op.hasTag(at::Tag::nondeterministic_seeded))
    draws.emplace();
  at::native::cpu_fallback(op, stack);
}

// -- tensors --

Tensor alias_on_cpu(const Tensor& tensor) {
  if (!tensor.is_privateuseone())
    return tensor;
  return at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(), [keep = tensor](void*) {}, tensor.options().device(at::kCPU));
}

Tensor alias_on_cpu(const optional<Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() ? alias_on_cpu(*tensor) : Tensor();
}

Tensor to_device(const Tensor& tensor) {
  if (!tensor.defined())
    return tensor;
  auto options = tensor.options().device(c10::Device(kDevice, current));
  auto copy = at::empty_strided(tensor.sizes(), tensor.strides(), options);
  alias_on_cpu(copy).copy_(tensor);
  return copy;
}

at::ScalarType checked(optional<at::ScalarType> type) {
  TORCH_CHECK_TYPE(type != at::kDouble || !refuses_fp64, "npu has no float64");
  return c10::dtype_or_default(type);
}

Tensor empty(
    IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device> device,
    optional<bool>, optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator, keys, checked(dtype), format);
}

Tensor empty_strided(
    IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
    optional<at::Device> device, optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, checked(dtype));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  alias_on_cpu(to).copy_(alias_on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  return alias_on_cpu(tensor).item();
}

Tensor strided_view(const Tensor& self, IntArrayRef size, IntArrayRef stride, optional<int64_t> offset) {
  return at::cpu::as_strided(self, size, stride, offset);
}

Tensor reshape_alias(const Tensor& self, IntArrayRef size, IntArrayRef stride) {
  return strided_view(self, size, stride, self.storage_offset());
}

Tensor view(const Tensor& self, IntArrayRef shape) {
  auto size = at::infer_size_dv(shape, self.numel());
  auto stride = at::detail::computeStride(self.sizes(), self.strides(), size);
  TORCH_CHECK(stride.has_value(), "view: the tensor can't be seen with this shape without a copy");
  return strided_view(self, size, *stride, self.storage_offset());
}

Tensor unfold(const Tensor& self, int64_t dim, int64_t size, int64_t step) {
  dim = at::maybe_wrap_dim(dim, self.dim());
  std::vector<int64_t> sizes = self.sizes().vec(), strides = self.strides().vec();
  sizes[dim] = (sizes[dim] - size) / step + 1;
  sizes.push_back(size);
  strides.push_back(strides[dim]);
  strides[dim] *= step;
  return strided_view(self, sizes, strides, self.storage_offset());
}

const Tensor& resize(const Tensor& self, IntArrayRef size, optional<at::MemoryFormat> format) {
  if (self.sizes() == size && !format.has_value())
    return self;  // with its strides: it may be a view
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_sizes_contiguous(size);
  const size_t needed = (tensor->numel() + tensor->storage_offset()) * tensor->itemsize();
  if (needed > tensor->storage().nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(tensor->storage(), needed);
  if (format.has_value() && *format != at::MemoryFormat::Contiguous)
    tensor->empty_tensor_restride(*format);
  return self;
}

Tensor& set_storage_view(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_storage_offset(offset);
  if (stride.data() == nullptr)
    tensor->set_sizes_contiguous(size);
  else
    tensor->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  const auto size = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage_view(self, std::move(storage), 0, {size}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& other) {
  return set_storage_view(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

Tensor& set_nothing(Tensor& self) {
  return set_storage_view(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &allocator, true), 0, {0}, {});
}

// Whether `tensor.data = other` is allowed: FSDP2 moves weights so.
bool can_share(const Tensor& self, const Tensor& from) {
  return (self.is_privateuseone() || self.is_cpu()) && (from.is_privateuseone() || from.is_cpu());
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const optional<Tensor>& bias, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  return to_device(at::convolution_symint(
      alias_on_cpu(input), alias_on_cpu(weight), alias_on_cpu(bias), stride, padding, dilation, transposed,
      output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  const std::vector<c10::SymInt> bias{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  auto [of_input, of_weight, of_bias] = at::convolution_backward_symint(
      alias_on_cpu(gradient), alias_on_cpu(input), alias_on_cpu(weight), at::OptionalSymIntArrayRef(bias), stride,
      padding, dilation, transposed, output_padding, groups, mask);
  return {to_device(of_input), to_device(of_weight), to_device(of_bias)};
}

// The schema doesn't say that it writes running_mean and running_var.
std::tuple<Tensor, Tensor, Tensor> batch_norm(
    const Tensor& input, const optional<Tensor>& weight, const optional<Tensor>& bias,
    const optional<Tensor>& running_mean, const optional<Tensor>& running_var, bool training, double momentum,
    double eps) {
  auto [output, mean, deviation] = at::native_batch_norm(
      alias_on_cpu(input), alias_on_cpu(weight), alias_on_cpu(bias), alias_on_cpu(running_mean),
      alias_on_cpu(running_var), training, momentum, eps);
  return {to_device(output), to_device(mean), to_device(deviation)};
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("_copy_from", &copy_from);
  library.impl("_copy_from_and_resize", &copy_from_and_resize);
  library.impl("_local_scalar_dense", &item);
  library.impl("as_strided", &strided_view);
  library.impl("_reshape_alias", &reshape_alias);
  library.impl("view", &view);
  library.impl("unfold", &unfold);
  library.impl("resize_", &resize);
  library.impl("set_.source_Storage_storage_offset", &set_storage_view);
  library.impl("set_.source_Storage", &set_storage);
  library.impl("set_.source_Tensor", &set_tensor);
  library.impl("set_", &set_nothing);
  library.impl("_has_compatible_shallow_copy_type", &can_share);
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
  library.impl("native_batch_norm", &batch_norm);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

// As CUDA's, of what this package uses; the macros want the library to be called m.
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv_transpose2d, input, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(einsum, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(group_norm, fp32)
  KERNEL_PRIVATEUSEONE(mse_loss, fp32)
  KERNEL_PRIVATEUSEONE(l1_loss, fp32)
  KERNEL_PRIVATEUSEONE(nll_loss, fp32)
}

TORCH_LIBRARY(simulated_npu, library) {
  library.def("alias_on_cpu(Tensor self) -> Tensor");
  library.def("device_count() -> int", [] { return static_cast<int64_t>(num_devices); });
  library.def("set_device_count(int count) -> ()", [](int64_t count) { num_devices = static_cast<int>(count); });
  library.def("current_device() -> int", [] { return static_cast<int64_t>(current); });
  library.def("set_device(int device) -> ()", [](int64_t device) {
    TORCH_CHECK(device < num_devices, "npu:", device, ": there are ", num_devices, " devices");
    current = static_cast<c10::DeviceIndex>(device);
  });
  library.def("memory(bool largest) -> int", [](bool largest) { return largest ? peak.load() : allocated.load(); });
  library.def("refuse_fp64(bool refuse) -> ()", [](bool refuse) { refuses_fp64 = refuse; });
  library.def("reset_peak_memory() -> ()", [] { peak = allocated.load(); });
  library.def("manual_seed(int device, int seed) -> ()", [](int64_t device, int64_t seed) {
    generator(device).set_current_seed(static_cast<uint64_t>(seed));
  });
  library.def("get_rng_state(int device) -> Tensor", [](int64_t device) { return generator(device).get_state(); });
  library.def("set_rng_state(int device, Tensor state) -> ()", [](int64_t device, const Tensor& state) {
    generator(device).set_state(state);
  });
}

TORCH_LIBRARY_IMPL(simulated_npu, PrivateUse1, library) {
  library.impl("alias_on_cpu", [](const Tensor& self) { return alias_on_cpu(self); });
}
