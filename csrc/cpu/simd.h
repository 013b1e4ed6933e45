// Native-width vectors of one tier, as GCC vector extensions. Included by kernels.inl inside the tier's unnamed
// namespace, after its target pragma: nothing here has external linkage. Free of torch.

#define RIBFAST_INLINE inline __attribute__((always_inline))

constexpr int kLanes = RIBFAST_VECTOR_BYTES / 4;  // of float; double has half as many

typedef float VFloat __attribute__((vector_size(RIBFAST_VECTOR_BYTES)));
typedef double VDouble __attribute__((vector_size(RIBFAST_VECTOR_BYTES)));
typedef int32_t VInt32 __attribute__((vector_size(RIBFAST_VECTOR_BYTES)));
typedef int64_t VInt64 __attribute__((vector_size(RIBFAST_VECTOR_BYTES)));
typedef uint16_t VHalfBits __attribute__((vector_size(RIBFAST_VECTOR_BYTES / 2)));
typedef int16_t VHalfMask __attribute__((vector_size(RIBFAST_VECTOR_BYTES / 2)));
typedef uint32_t VUInt32 __attribute__((vector_size(RIBFAST_VECTOR_BYTES)));

template <typename S>
struct Wide;
template <>
struct Wide<float> {
  using V = VFloat;
  using Mask = VInt32;
};
template <>
struct Wide<double> {
  using V = VDouble;
  using Mask = VInt64;
};

template <typename V>
RIBFAST_INLINE V load_raw(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <typename V>
RIBFAST_INLINE void store_raw(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <typename S>
RIBFAST_INLINE typename Wide<S>::V splat(S value) {
  return typename Wide<S>::V{} + value;
}

template <typename S>
RIBFAST_INLINE S sum_lanes(typename Wide<S>::V v) {
  S total = 0;
  for (unsigned i = 0; i < sizeof v / sizeof(S); ++i) total += v[i];
  return total;
}

template <typename To, typename From>
RIBFAST_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits: sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

RIBFAST_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return bits<float>(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | mantissa << 13);
}

RIBFAST_INLINE uint16_t float_to_half(float f) {  // to nearest, ties to even
  const uint32_t u = bits<uint32_t>(f), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal in half: adding 0.5 leaves its bits at the bottom, rounded
    return static_cast<uint16_t>(sign | (bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

RIBFAST_INLINE uint16_t float_to_bfloat16(float f) {  // to nearest, ties to even
  const uint32_t u = bits<uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// How each storage is read into accumulators and written from them.
template <Storage>
struct Stored;

template <typename T>
struct StoredWide {
  using Element = T;
  using S = T;
  using V = typename Wide<T>::V;
  static constexpr int lanes = sizeof(V) / sizeof(S);
  static RIBFAST_INLINE S get(const T* p) { return *p; }
  static RIBFAST_INLINE T from(S value) { return value; }
  static RIBFAST_INLINE V load(const T* p) { return load_raw<V>(p); }
  static RIBFAST_INLINE void store(T* p, V v) { store_raw(p, v); }
  // value where the mask is set, else 0
  static RIBFAST_INLINE void store_where(T* p, typename Wide<T>::Mask mask, T value) {
    store_raw(p, mask & bits<typename Wide<T>::Mask>(splat<S>(value)));
  }
};
template <>
struct Stored<kDouble> : StoredWide<double> {};
template <>
struct Stored<kFloat> : StoredWide<float> {};

struct StoredNarrow {
  using Element = uint16_t;
  using S = float;
  using V = VFloat;
  static constexpr int lanes = kLanes;
  static RIBFAST_INLINE void store_where(uint16_t* p, VInt32 mask, uint16_t value) {
    store_raw(p, bits<VHalfBits>(__builtin_convertvector(mask, VHalfMask)) & (VHalfBits{} + value));
  }
};

template <>
struct Stored<kHalf> : StoredNarrow {
  static RIBFAST_INLINE float get(const uint16_t* p) { return half_to_float(*p); }
  static RIBFAST_INLINE uint16_t from(float value) { return float_to_half(value); }
  static RIBFAST_INLINE VFloat load(const uint16_t* p) {
#if RIBFAST_VECTOR_BYTES == 64
    return bits<VFloat>(_mm512_cvtph_ps(load_raw<__m256i>(p)));
#elif RIBFAST_VECTOR_BYTES == 32
    return bits<VFloat>(_mm256_cvtph_ps(load_raw<__m128i>(p)));
#else
    VFloat v;
    for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
    return v;
#endif
  }
  static RIBFAST_INLINE void store(uint16_t* p, VFloat v) {
#if RIBFAST_VECTOR_BYTES == 64
    store_raw(p, _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif RIBFAST_VECTOR_BYTES == 32
    store_raw(p, _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
#endif
  }
};

template <>
struct Stored<kBFloat16> : StoredNarrow {
  static RIBFAST_INLINE float get(const uint16_t* p) { return bits<float>(uint32_t(*p) << 16); }
  static RIBFAST_INLINE uint16_t from(float value) { return float_to_bfloat16(value); }
  static RIBFAST_INLINE VFloat load(const uint16_t* p) {
    return bits<VFloat>(__builtin_convertvector(load_raw<VHalfBits>(p), VUInt32) << 16);
  }
  static RIBFAST_INLINE void store(uint16_t* p, VFloat v) {
    const VUInt32 u = bits<VUInt32>(v);
    const VUInt32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const VUInt32 nan = bits<VUInt32>(v != v);
    store_raw(p, __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), VHalfBits));
  }
};
