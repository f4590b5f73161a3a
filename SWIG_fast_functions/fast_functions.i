// The Python module. Arrays come in by the buffer protocol (PEP 3118), so numpy is not needed to build it. An argument
// is checked here for its type and layout, and in fast_functions.cc for its shape and value.
%module fast_functions
%feature("autodoc", "0");
%feature("kwargs");

%{
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "fast_functions.h"

namespace {

// The memory of a Python array, held until the wrapper returns.
struct Buffer {
  Py_buffer view{};
  ~Buffer() { PyBuffer_Release(&view); }

  char type() const {  // the format's one letter; 0 if it is a structure or in another byte order
    const char* format = view.format ? view.format : "B";
    const bool swapped = *format == (PY_LITTLE_ENDIAN ? '>' : '<') || (PY_LITTLE_ENDIAN && *format == '!');
    if (*format && std::strchr("@=<>!^|", *format) && (view.itemsize == 1 || !swapped)) ++format;
    return std::strlen(format) == 1 ? *format : 0;
  }

  std::vector<int64_t> strides() const {
    if (view.strides) return {view.strides, view.strides + view.ndim};
    std::vector<int64_t> strides(view.ndim, view.itemsize);  // ctypes gives none: C-contiguous
    for (int i = view.ndim - 1; i > 0; --i) strides[i - 1] = strides[i] * view.shape[i];
    return strides;
  }
};

// "numpy.ndarray of float64", or "list"
std::string kind_of(PyObject* object) {
  PyErr_Clear();
  PyObject* dtype = PyObject_GetAttrString(object, "dtype");
  PyObject* name = dtype ? PyObject_Str(dtype) : nullptr;
  const char* text = name ? PyUnicode_AsUTF8(name) : nullptr;
  const std::string kind = std::string(Py_TYPE(object)->tp_name) + (text ? std::string(" of ") + text : "");
  PyErr_Clear();
  Py_XDECREF(name);
  Py_XDECREF(dtype);
  return kind;
}

// Fills `buffer`; its elements must have one of the types and `itemsize` bytes. Otherwise sets a TypeError.
bool get_array(PyObject* object, Buffer& buffer, const char* name, const char* types, Py_ssize_t itemsize,
               const char* wanted) {
  const bool is_buffer = PyObject_GetBuffer(object, &buffer.view, PyBUF_RECORDS_RO) == 0;
  const char type = is_buffer ? buffer.type() : 0;
  if (type && std::strchr(types, type) && buffer.view.itemsize == itemsize) return true;
  PyErr_Format(PyExc_TypeError, "%s must be a %s array, not %s", name, wanted, kind_of(object).c_str());
  return false;
}

// For an array that is written to: sets a ValueError unless it is writable, C-contiguous and of `axes` axes.
bool is_writable(const Buffer& buffer, const char* name, int axes) {
  if (buffer.view.readonly)
    PyErr_Format(PyExc_ValueError, "%s must be writable, not read-only", name);
  else if (buffer.view.ndim != axes)
    PyErr_Format(PyExc_ValueError, "%s must have %d %s, not %d", name, axes, axes == 1 ? "axis" : "axes",
                 buffer.view.ndim);
  else if (!PyBuffer_IsContiguous(&buffer.view, 'C'))
    PyErr_Format(PyExc_ValueError, "%s must be C-contiguous, not strided or Fortran-ordered", name);
  else
    return true;
  return false;
}

// Lets other Python threads run during the computation.
struct WithoutGIL {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGIL() { PyEval_RestoreThread(state); }
};

}  // namespace
%}

%typemap(in) Volume (Buffer buffer) {
  if (!get_array($input, buffer, "$1_name", "B", 1, "uint8") || !is_writable(buffer, "$1_name", 3)) SWIG_fail;
  $1.voxels = static_cast<uint8_t*>(buffer.view.buf);
  for (int i = 0; i < 3; ++i) $1.shape[i] = buffer.view.shape[i];
}

%typemap(in) const Mask& (Buffer buffer, Mask mask) {
  if (!get_array($input, buffer, "$1_name", "B?", 1, "bool or uint8")) SWIG_fail;
  mask.voxels = static_cast<const uint8_t*>(buffer.view.buf);
  mask.shape.assign(buffer.view.shape, buffer.view.shape + buffer.view.ndim);
  mask.strides = buffer.strides();
  $1 = &mask;
}

%typemap(in) uint32_t P[3] (Buffer buffer, uint32_t counts[3]) {
  if (!get_array($input, buffer, "$1_name", "IL", 4, "uint32") || !is_writable(buffer, "$1_name", 1)) SWIG_fail;
  if (buffer.view.shape[0] != 3) {
    PyErr_Format(PyExc_ValueError, "$1_name must have 3 elements, not %zd", buffer.view.shape[0]);
    SWIG_fail;
  }
  $1 = counts;
}
%typemap(argout) uint32_t P[3] {
  std::memcpy(buffer$argnum.view.buf, counts$argnum, sizeof counts$argnum);  // which need not be aligned
}

%typemap(in) double threshold {
  $1 = PyFloat_AsDouble($input);
  if (PyErr_Occurred()) {
    PyErr_Format(PyExc_TypeError, "$1_name must be a number, not %s", kind_of($input).c_str());
    SWIG_fail;
  }
}

%typemap(in) bool top2 {
  const int truth = PyNumber_Check($input) ? PyObject_IsTrue($input) : -1;
  if (truth < 0) {
    PyErr_Format(PyExc_TypeError, "$1_name must be True or False, not %s", kind_of($input).c_str());
    SWIG_fail;
  }
  $1 = truth == 1;
}

%exception {
  try {
    WithoutGIL without_gil;
    $action
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    SWIG_fail;
  } catch (const std::overflow_error& error) {
    PyErr_SetString(PyExc_OverflowError, error.what());
    SWIG_fail;
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
    SWIG_fail;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    SWIG_fail;
  }
}

%feature("docstring") post_processing "
Remove the small components of a mask, in place (the post-processing of Zhou et al. 2017 and Yu et al. 2018).

Keeps the 6-connected components of at least `threshold` times the size of the largest one, and sets the others to 0.
F stays as it is where no voxel is set, or where floor(voxels / 2) or more are.

Args:
    F: (X, Y, Z) uint8, writable, C-contiguous; a voxel is foreground where it is not 0.
    S: (X, Y, Z) bool or uint8, the seed volume; its shape is checked, and it has no effect.
    threshold: 0 or more, 0.5 in the pipeline.
    top2: measure against the second largest component, where there are two.

Raises:
    TypeError: an array of another type. ValueError: another shape or layout, a threshold below 0 or nan.
"
%feature("docstring") DSC_computation "
Count the voxels that are set in A, in G and in both, from which Dice is 2 P[2] / (P[0] + P[1]).

Args:
    A, G: bool or uint8, of one shape, any strides; a voxel is set where it is not 0.
    P: (3,) uint32, writable, C-contiguous, for the three counts |A|, |G| and |A and G|.

Raises:
    TypeError: an array of another type. ValueError: another shape or layout.
    OverflowError: a count does not fit uint32 (P is unchanged).
"

void post_processing(Volume F, const Mask& S, double threshold, bool top2);
void DSC_computation(const Mask& A, const Mask& G, uint32_t P[3]);
