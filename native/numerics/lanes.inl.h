// Sums and maxima over the lanes of a vector, included by the kernels.inl.h files inside the unnamed
// namespace of each isa_*.cpp, so that every instruction set has its own. Needs platform.h.

template <int kBytes>
struct IndexOf {
  typedef std::int32_t Type __attribute__((vector_size(kBytes)));  // an alias would lose the attribute
};

/// Every lane becomes all lanes put together, in log2 rounds. By shuffles: taken apart through memory, a
/// running value would live there.
template <int kDistance, class Numbers, class Operation>
INNERKV_HD Numbers combine_lanes(Numbers v, Operation operation) {
  if constexpr (kDistance == 0) {
    return v;
  } else {
    Numbers swapped;
#if defined(__clang__)  // sees through the loop
    for (int l = 0; l < static_cast<int>(sizeof(Numbers) / 4); ++l) swapped[l] = v[l ^ kDistance];
#else
    typename IndexOf<sizeof(Numbers)>::Type partner;
    for (int l = 0; l < static_cast<int>(sizeof(Numbers) / 4); ++l) partner[l] = l ^ kDistance;
    swapped = __builtin_shuffle(v, partner);
#endif
    return combine_lanes<kDistance / 2>(operation(v, swapped), operation);
  }
}
