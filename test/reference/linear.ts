/** Plain dense float64 linear algebra, row-major [n * n]. Source: Golub and Van Loan, section 4.2. */

/** A[i * n + j]. */
export type Matrix = Float64Array;

export function identity(n: number): Matrix {
  return Float64Array.from({ length: n * n }, (_, i) => Number(i % (n + 1) === 0));
}

export function transpose(a: Matrix, n: number): Matrix {
  return a.map((_, i) => a[(i % n) * n + Math.floor(i / n)]!);
}

export function multiply(a: Matrix, b: Matrix, n: number): Matrix {
  const product = new Float64Array(n * n);
  for (let i = 0; i < n; i++)
    for (let k = 0; k < n; k++)
      for (let j = 0; j < n; j++) product[i * n + j]! += a[i * n + k]! * b[k * n + j]!;
  return product;
}

export function trace(a: Matrix, n: number): number {
  let sum = 0;
  for (let i = 0; i < n; i++) sum += a[i * n + i]!;
  return sum;
}

/** xᵀ A x. */
export function quadraticForm(a: ArrayLike<number>, x: ArrayLike<number>): number {
  const n = x.length;
  let sum = 0;
  for (let i = 0; i < n; i++) for (let j = 0; j < n; j++) sum += x[i]! * a[i * n + j]! * x[j]!;
  return sum;
}

/** Lower L with A = L·Lᵀ; throws unless A is positive definite. */
export function cholesky(a: Matrix, n: number): Matrix {
  const L = new Float64Array(n * n);
  for (let i = 0; i < n; i++)
    for (let j = 0; j <= i; j++) {
      let sum = a[i * n + j]!;
      for (let k = 0; k < j; k++) sum -= L[i * n + k]! * L[j * n + k]!;
      if (i === j && !(sum > 0)) throw new Error(`not positive definite at row ${i}`);
      L[i * n + j] = i === j ? Math.sqrt(sum) : sum / L[j * n + j]!;
    }
  return L;
}

/** Inverse of a lower triangular matrix, by forward substitution. */
export function invertLower(L: Matrix, n: number): Matrix {
  const inverse = new Float64Array(n * n);
  for (let column = 0; column < n; column++)
    for (let i = column; i < n; i++) {
      let sum = Number(i === column);
      for (let k = column; k < i; k++) sum -= L[i * n + k]! * inverse[k * n + column]!;
      inverse[i * n + column] = sum / L[i * n + i]!;
    }
  return inverse;
}

/** Inverse of a positive definite matrix: (L·Lᵀ)^-1 = L^-ᵀ·L^-1. */
export function invertPositive(a: Matrix, n: number): Matrix {
  const inverse = invertLower(cholesky(a, n), n);
  return multiply(transpose(inverse, n), inverse, n);
}

/** Upper U with A^-1 = Uᵀ·U. */
export function upperFactorOfInverse(a: Matrix, n: number): Matrix {
  return transpose(cholesky(invertPositive(a, n), n), n);
}
