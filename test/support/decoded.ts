/**
 * Stored tokens decoded in float32, one rounding per operation: what readBack() returns. The order of operations is that of
 * docs/format.md sections 3, 5 and 8, backwards: s·c, + z, + outliers; then H, ·lam, + mu, and the rotation by +P.
 */
import { type CachedToken, type ReferenceHead, type Stored } from '../reference/cache';
import { fromHalfBits } from '../reference/half';
import { decodeToken } from '../reference/quantise';
import { hadamard32, pairChannels, type KeySteps, type Rope } from '../reference/transform';
import { type TensorSpec } from '../reference/types';

const f = Math.fround;

interface Decoded {
  readonly key: Float32Array;
  readonly value: Float32Array;
}

/** Tokens never change, and what they decode to depends on nothing else; removed and truncated ones are forgotten. */
const known = new WeakMap<CachedToken, Decoded>();

export function decodedToken(head: ReferenceHead, token: CachedToken): Decoded {
  const seen = known.get(token);
  if (seen) return seen;
  const decoded = { key: decodedKey(head, token), value: decodedValue(head, token) };
  known.set(token, decoded);
  return decoded;
}

/** `exact`: everything that is stored, in float64. */
function stored32(exact: Float64Array, stored: Stored, spec: TensorSpec): Float32Array {
  // s·c is exact in float32, so that rounding the float64 value once gives what float32 gives.
  if (stored.kind !== 'token' || !stored.token.outliers) return Float32Array.from(exact);
  const { outliers, ...dense } = stored.token;
  const x = Float32Array.from(decodeToken(dense, spec));
  for (const { channel, valueBits } of outliers) x[channel]! += fromHalfBits(valueBits);
  return x;
}

function decodedKey(head: ReferenceHead, token: CachedToken): Float32Array {
  const stored = stored32(head.storedKey(token), token.key, head.scheme.key);
  return token.key.kind === 'window' ? stored : restoreKey32(stored, head.keySteps(token.position));
}

function decodedValue(head: ReferenceHead, token: CachedToken): Float32Array {
  const stored = stored32(head.storedValue(token), token.value, head.scheme.value);
  return token.value.kind !== 'window' && head.valuesRotate() ? hadamard32(stored) : stored;
}

function restoreKey32(x: Float32Array, { rotation, mu, lam, hadamard }: KeySteps): Float32Array {
  let key = hadamard ? hadamard32(x) : x;
  if (lam) key = key.map((value, c) => f(value * lam[c]!));
  if (mu) key = key.map((value, c) => f(value + mu[c]!));
  return rotation ? rotateForward32(key, rotation.P, rotation.rope) : key;
}

function rotateForward32(x: Float32Array, P: number, rope: Rope): Float32Array {
  const out = Float32Array.from(x);
  for (let i = 0; i < rope.rotaryDims / 2; i++) {
    const c = f(Math.cos(P * rope.theta[i]!));
    const s = f(Math.sin(P * rope.theta[i]!));
    const [a, b] = pairChannels(i, rope);
    out[a] = f(f(x[a]! * c) - f(x[b]! * s));
    out[b] = f(f(x[b]! * c) + f(x[a]! * s));
  }
  return out;
}
