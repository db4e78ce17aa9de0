/* The part of DLPack 1.x that infinilm's backends speak: https://dmlc.github.io/dlpack/latest/c_api.html
 *
 * Layouts and names are the standard's. A file that needs more of it includes its own dlpack.h first: this one then
 * defines nothing.
 */
#ifndef DLPACK_DLPACK_H_
#define DLPACK_DLPACK_H_

#include <stdint.h>

#define DLPACK_MAJOR_VERSION 1
#define DLPACK_MINOR_VERSION 0

#ifdef __cplusplus
extern "C" {
#endif

/* Values of DLDevice.device_type and of DLDataType.code. */
enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLROCM = 10, kDLExtDev = 12, kDLOneAPI = 14 };
enum {
  kDLInt = 0,
  kDLUInt = 1,
  kDLFloat = 2,
  kDLBfloat = 4,
  kDLBool = 6,
  kDLFloat8_e4m3fn = 10,
  kDLFloat8_e4m3fnuz = 11,
  kDLFloat8_e5m2 = 12,
  kDLFloat8_e5m2fnuz = 13,
  kDLFloat8_e8m0fnu = 14
};

typedef struct {
  uint32_t major;
  uint32_t minor;
} DLPackVersion;

typedef struct {
  int32_t device_type;
  int32_t device_id;
} DLDevice;

typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes; /* 1 */
} DLDataType;

typedef struct {
  void *data; /* element 0 is byte_offset bytes behind it */
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;   /* [ndim] */
  int64_t *strides; /* [ndim], in elements; never NULL where infinilm is involved, unless ndim is 0 */
  uint64_t byte_offset;
} DLTensor;

/* A tensor that whoever receives it owns: it calls `deleter` exactly once, from any thread. A receiver that does not
 * know version.major reads nothing but `deleter`, and calls it. */
typedef struct DLManagedTensorVersioned {
  DLPackVersion version;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensorVersioned *self);
  uint64_t flags; /* bit 0: read-only; bit 1: a copy that the receiver alone has */
  DLTensor dl_tensor;
} DLManagedTensorVersioned;

#ifdef __cplusplus
}
#endif

#endif
