// Runs a model that `surgeon compile` made, without Python: run DIR [TAU CONSTANT...].
//
// It runs the example inputs that lie beside the model, and prints how far the outputs are off. TAU is set in the given
// constants first (compiled.json names them). Then the outputs may differ.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <unordered_map>
#include <vector>

// A list of tensors of what torch.save wrote as a dict.
std::vector<at::Tensor> tensors(const c10::IValue& saved, const char* name) {
  std::vector<at::Tensor> found;
  for (const c10::IValue& value : saved.toGenericDict().at(name).toListRef()) found.push_back(value.toTensor());
  return found;
}

int main(int count, char** arguments) {
  if (count < 2) {
    std::cerr << "run DIR [TAU CONSTANT...]\n";
    return 2;
  }
  std::string directory = arguments[1], library = directory + "/surgeon_cpu.so";
  // It registers the operators of the model. A model without experts has no library.
  if (std::ifstream(library) && !dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL)) {
    std::cerr << dlerror() << "\n";
    return 1;
  }
  try {
    c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader model(directory + "/model.pt2");
    if (count > 3) {
      std::unordered_map<std::string, at::Tensor> constants;
      for (int i = 3; i < count; ++i) constants[arguments[i]] = at::tensor(std::stof(arguments[2]));
      model.load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/false);
    }
    std::ifstream file(directory + "/example.pt", std::ios::binary);
    std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    c10::IValue example = torch::jit::pickle_load(bytes);
    std::vector<at::Tensor> wanted = tensors(example, "outputs"), found = model.run(tensors(example, "inputs"));
    double off = 0;
    for (size_t i = 0; i < found.size(); ++i) off = std::max(off, (found[i] - wanted[i]).abs().max().item<double>());
    std::cout << off << "\n";
  } catch (const std::exception& error) {  // such as inputs that the model does not take
    std::cerr << error.what() << "\n";
    return 1;
  }
}
