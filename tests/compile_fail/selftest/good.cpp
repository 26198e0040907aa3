// expect: a matrix; of two dimensions
template <int Dimensions>
int make_matrix() {
  static_assert(Dimensions == 2, "a matrix; of two dimensions");
  return Dimensions;
}
int right() { return make_matrix<2>(); }
#ifdef MISUSE
int wrong() { return make_matrix<3>(); }
#endif
