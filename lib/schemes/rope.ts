/** Rotary frequencies of a model, in float64. Everything that rotates (core, basis, demo) takes them from here. */
import { invalid } from '../errors';
import { type RopeOptions, type RopeScaling } from './types';

function positive(value: number, name: string): void {
  if (!Number.isFinite(value) || value <= 0)
    throw invalid(`${name} must be a positive number, not ${value}.`);
}

/** Channels that rotate, checked against `headDim`. */
export function rotaryDims(rope: RopeOptions, headDim: number): number {
  const dims = rope.rotaryDims ?? (rope.theta ? 2 * rope.theta.length : headDim);
  if (!Number.isInteger(dims) || dims < 2 || dims > headDim || dims % 2 !== 0)
    throw invalid(`rope.rotaryDims must be an even number from 2 to headDim (${headDim}), not ${dims}.`);
  return dims;
}

/** Radians per position of each pair of channels, [rotaryDims / 2]. */
export function ropeFrequencies(rope: RopeOptions, headDim: number): Float64Array {
  const dims = rotaryDims(rope, headDim);
  // Options arrive from plain JavaScript too.
  if (!['half', 'adjacent'].includes(rope.layout))
    throw invalid(`rope.layout must be "half" or "adjacent", not ${JSON.stringify(rope.layout)}.`);
  if (rope.theta) {
    if (rope.theta.length !== dims / 2)
      throw invalid(`rope.theta must hold ${dims / 2} frequencies, not ${rope.theta.length}.`);
    if (!rope.theta.every(Number.isFinite)) throw invalid('rope.theta must hold finite numbers.');
    return Float64Array.from(rope.theta);
  }
  positive(rope.base, 'rope.base');
  const plain = Float64Array.from({ length: dims / 2 }, (_, i) => rope.base ** ((-2 * i) / dims));
  return rope.scaling ? plain.map(scaled(rope.scaling)) : plain;
}

function scaled(scaling: RopeScaling): (theta: number) => number {
  positive(scaling.factor, 'rope.scaling.factor');
  if (scaling.type === 'linear') return (theta) => theta / scaling.factor;
  // Options arrive from plain JavaScript too.
  if ((scaling.type as string) !== 'llama3')
    throw invalid(`rope.scaling.type must be "linear" or "llama3", not ${JSON.stringify(scaling.type)}.`);
  const { factor, lowFreqFactor, highFreqFactor, originalContext } = scaling;
  positive(lowFreqFactor, 'rope.scaling.lowFreqFactor');
  positive(originalContext, 'rope.scaling.originalContext');
  if (!(highFreqFactor > lowFreqFactor))
    throw invalid('rope.scaling.highFreqFactor must be greater than lowFreqFactor.');
  return (theta) => {
    // Turns that this pair makes within the context the model was first trained on: fast pairs stay, slow pairs are
    // stretched by the factor, and between the two thresholds the frequency is interpolated.
    const turns = (originalContext * theta) / (2 * Math.PI);
    const keep = Math.min(1, Math.max(0, (turns - lowFreqFactor) / (highFreqFactor - lowFreqFactor)));
    return keep * theta + (1 - keep) * (theta / factor);
  };
}
