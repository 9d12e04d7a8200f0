// Errors of the C++ part as exceptions of the Python package; for the modules.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>

#include "common/check.h"

namespace avser {

// avser::Error becomes the class of avser_fast.errors that its kind names.
inline void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    const char* name = nullptr;
    switch (error.kind()) {
      case ErrorKind::input:
        name = "InputError";
        break;
      case ErrorKind::model:
        name = "ModelError";
        break;
      case ErrorKind::config:
        name = "ConfigError";
        break;
      case ErrorKind::backend:
        name = "BackendError";
        break;
    }
    const pybind11::object type = pybind11::module_::import("avser_fast.errors").attr(name);
    // A message may name a file whose name is not UTF-8.
    const pybind11::object text = pybind11::bytes(error.what()).attr("decode")("utf-8", "replace");
    PyErr_SetObject(type.ptr(), text.ptr());
  }
}

}  // namespace avser
