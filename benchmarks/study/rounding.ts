/**
 * What rounding itself could still gain, on recorded keys: the query-weighted error that is left, e'We / x'Wx, for searches
 * of several widths in the error feedback and for scales in fewer bits. Codes and their number are the same everywhere.
 */
import { parseMoments } from '../../lib/schemes/moments';
import { basisDeriver } from '../../lib/schemes/basis';
import { clipRatios } from '../../lib/schemes/preset';
import { decodeFloats, readSafetensors } from '../../lib/schemes/safetensors';
import { type HeadBasis } from '../../lib/schemes/types';
import { hadamard64, rotateBack32, ropeFrequencies } from '../../test/reference/transform';

const LAYERS = [0, 9, 19, 29];
const [KV_HEADS, D, FIRST, EVERY, BLOCK] = [3, 64, 160, 12, 128];

export interface RoundingRow {
  readonly bits: number;
  readonly search: string;
  readonly scale: string;
  /** Mean over tokens, heads and layers. */
  readonly weightedError: number;
}

type Scale = (value: number) => number;

const SCALES: Readonly<Record<'16 bits' | '8 bits, logarithmic', Scale>> = {
  '16 bits': (value) => Math.fround(value),
  // A step of 1/16 octave: 256 of them span 16 octaves.
  '8 bits, logarithmic': (value) => 2 ** (Math.round(16 * Math.log2(value)) / 16),
};

const CANDIDATES = [
  ['nearest, no feedback', 0, '16 bits'],
  ['feedback', 1, '16 bits'],
  ['feedback, beam of 2', 2, '16 bits'],
  ['feedback, beam of 4', 4, '16 bits'],
  ['feedback, beam of 16', 16, '16 bits'],
  ['feedback', 1, '8 bits, logarithmic'],
] as const;

/** Codes of x by a search that keeps the `width` best beginnings, each tried with its two nearest codes when width > 1; 0: without feedback. */
function search(x: Float64Array, s: number, levels: number, basis: HeadBasis, width: number): Float64Array {
  interface Path {
    loss: number;
    y: Float64Array;
    decoded: Float64Array;
  }
  let paths: Path[] = [{ loss: 0, y: Float64Array.from(x), decoded: new Float64Array(D) }];
  for (let c = 0; c < D; c++) {
    const next: { from: Path; value: number; loss: number }[] = [];
    for (const from of paths) {
      const exact = from.y[c]! / s + (levels - 1) / 2;
      const clamp = (code: number) => Math.min(levels - 1, Math.max(0, code));
      const nearest = clamp(Math.round(exact));
      const codes =
        width <= 1 ? [nearest] : [...new Set([nearest, clamp(nearest + (exact > nearest ? 1 : -1))])];
      for (const code of codes) {
        const value = s * (code - (levels - 1) / 2);
        next.push({ from, value, loss: from.loss + ((from.y[c]! - value) * basis.pivot![c]!) ** 2 });
      }
    }
    next.sort((a, b) => a.loss - b.loss);
    paths = next.slice(0, Math.max(1, width)).map(({ from, value, loss }) => {
      const [y, decoded] = [Float64Array.from(from.y), Float64Array.from(from.decoded)];
      const error = y[c]! - value;
      if (width > 0) for (let j = c + 1; j < D; j++) y[j]! -= error * basis.feedback![c * D + j]!;
      decoded[c] = value;
      return { loss, y, decoded };
    });
  }
  return paths[0]!.decoded;
}

function weighted(basis: HeadBasis, a: Float64Array, b: Float64Array): number {
  let sum = 0;
  for (let i = 0; i < D; i++) for (let j = 0; j < D; j++) sum += a[i]! * basis.metric![i * D + j]! * b[j]!;
  return sum;
}

/** Share of the weighted energy that is lost, scales unbiased. */
function lossOf(x: Float64Array, bits: number, basis: HeadBasis, width: number, store: Scale): number {
  const levels = 2 ** bits;
  const step = (2 * Math.max(...x.map(Math.abs))) / (levels - 1);
  const energy = weighted(basis, x, x);
  let [least, best, chosen] = [Infinity, x, 1];
  for (const ratio of clipRatios(bits as 2)) {
    const decoded = search(x, store(ratio * step), levels, basis, width);
    const error = x.map((value, i) => value - decoded[i]!);
    const loss = weighted(basis, error, error);
    if (loss < least) [least, best, chosen] = [loss, decoded, store(ratio * step)];
  }
  const gain = store(chosen * Math.min(2, Math.max(0.5, energy / weighted(basis, x, best)))) / chosen;
  const error = x.map((value, i) => value - gain * best[i]!);
  return weighted(basis, error, error) / energy;
}

/** `data`: path of a file in the folder of evaluation data. */
export function roundingRows(data: (name: string) => string): RoundingRow[] {
  const recorded = readSafetensors(data('activations/smollm2_4layers_2048.safetensors'));
  const moments = parseMoments(readSafetensors(data('activations/smollm2_moments_wiki2048.safetensors')));
  const rope = { base: 100000, layout: 'adjacent' } as const;
  const derive = basisDeriver({ rope, headDim: D, blockTokens: BLOCK, context: 8192 });
  const turn = { layout: rope.layout, rotaryDims: D, theta: ropeFrequencies(D, rope.base) };
  const keys: { x: Float64Array; basis: HeadBasis }[] = [];
  for (const layer of LAYERS) {
    const all = decodeFloats(recorded.tensors.get(`layers.${layer}.key`)!)!;
    for (let head = 0; head < KV_HEADS; head++) {
      const basis = derive(moments.layers.get(layer)![head]!);
      for (let token = FIRST; token < 2048; token += EVERY) {
        const at = (token * KV_HEADS + head) * D;
        const key = Float32Array.from(all.subarray(at, at + D));
        const turned = rotateBack32(key, 32 + BLOCK * Math.floor((token - 32) / BLOCK), turn);
        const centred = Float64Array.from(turned, (value, c) => (value - basis.mean![c]!) / basis.lam![c]!);
        const rotated = hadamard64(centred);
        keys.push({ x: Float64Array.from(basis.order!, (channel) => rotated[channel]!), basis });
      }
    }
  }
  const mean = (values: readonly number[]) => values.reduce((a, b) => a + b, 0) / values.length;
  return [2, 3, 4].flatMap((bits) =>
    CANDIDATES.map(([name, width, scale]) => ({
      bits,
      search: name,
      scale,
      weightedError: mean(keys.map(({ x, basis }) => lossOf(x, bits, basis, width, SCALES[scale]))),
    })),
  );
}
