/** Two distributions over the next token, from their logits: loss, divergence, agreement. Sums in float64. */

/** A reference distribution, its probabilities kept for all that are compared with it. */
export interface Distribution {
  readonly logits: Float32Array;
  readonly probabilities: Float32Array;
  readonly logSum: number;
  readonly top: number;
}

export interface Comparison {
  /** −ln q(target), nats. */
  readonly nll: number;
  /** Σ p ln(p / q), nats. */
  readonly kld: number;
  readonly sameTop: boolean;
  /** q(target) − p(target). */
  readonly shift: number;
}

/** ln Σ exp(logits) and the first largest one. */
function logSumOf(logits: Float32Array): { logSum: number; top: number } {
  let top = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i]! > logits[top]!) top = i;
  const largest = logits[top]!;
  let sum = 0;
  for (const logit of logits) sum += Math.exp(logit - largest);
  return { logSum: largest + Math.log(sum), top };
}

export function distributionOf(logits: Float32Array): Distribution {
  const { logSum, top } = logSumOf(logits);
  const probabilities = new Float32Array(logits.length);
  for (let i = 0; i < logits.length; i++) probabilities[i] = Math.exp(logits[i]! - logSum);
  return { logits, probabilities, logSum, top };
}

export function compare(reference: Distribution, logits: Float32Array, target: number): Comparison {
  const { logSum, top } = logSumOf(logits);
  const { logits: theirs, probabilities, logSum: theirSum } = reference;
  const offset = theirSum - logSum;
  let kld = 0;
  for (let i = 0; i < logits.length; i++) kld += probabilities[i]! * (theirs[i]! - logits[i]! - offset);
  const nll = logSum - logits[target]!;
  const shift = Math.exp(-nll) - Math.exp(theirs[target]! - theirSum);
  return { nll, kld, sameTop: top === reference.top, shift };
}

export function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}
