// Runs a packaged model in a process without Python: runner LIBRARY PACKAGE TENSORS; prints how far the output is off.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <iostream>

int main(int count, char** arguments) {
  if (count != 4 || !dlopen(arguments[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::cerr << (count == 4 ? dlerror() : "three arguments") << "\n";
    return 1;
  }
  c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(arguments[2]);
  torch::jit::Module tensors = torch::jit::load(arguments[3]);
  at::Tensor found = model.run({tensors.attr("x").toTensor()})[0];
  std::cout << (found - tensors.attr("y").toTensor()).abs().max().item<float>() << "\n";
}
