/**
 * A model of the Llama family in float64, one token at a time, without any rounding of its own. Source: Llama 2 (arXiv 2307.09288),
 * RMSNorm (1910.07467), SwiGLU (2002.05202), RoPE (2104.09864), GQA (2305.13245); biases as in Qwen2, head norms as in Qwen3.
 *
 * Beside every number v runs the standard deviation e that a correct native run is to be expected to differ by: roundings are
 * independent and uniform, and errors add in squares, to first order. (Worst cases with every rounding of one sign grow by the root
 * of the width in each of seven products per layer: after two layers they permit anything.) Callers allow MOST standard
 * deviations. u = 2^-24.
 *   weights     2u·m, m the largest |scale·code| + |offset| of the tensor: at most four roundings of up to u each
 *   products    Σ w²e² + (2u·m)²x² + (K + 8)u²(w² + m²)x²       K terms in whatever order; codes and offsets apart where m > 0
 *   int8        x has step²/12 more, step = largest |x| of 32 / 127
 *   RMSNorm     x·r·g: r is off by r·(Σ x²e²)^½ / (n·mean x²); 3 roundings
 *   RoPE        c²e_a² + s²e_b² + (2u)²(a² + b²): cosine and sine are rounded too
 *   K and V     ulp²/12, ulp at most |x|·2^-10 and at least 2^-24: binary16
 *   attention   logits: σ²·Σ(q²e_k² + k²e_q²) and roundings; output: Σ p²(δ²(v − o)² + e_v²)
 *   SiLU        its slope times e, 4u for the exponential and the division
 */
import { pairChannels } from './transform';

const { abs, hypot, max, sqrt } = Math;
const u = 2 ** -24;

/** Standard deviations that a difference may have: of a million normal numbers the largest has about 5. */
export const MOST = 7;

/** Numbers and their standard deviations. */
export interface Tracked {
  readonly v: Float64Array;
  readonly e: Float64Array;
}

/** A stored tensor: exact values, row-major, and the largest |scale·code| + |offset| (0 if stored without scales). */
export interface LlamaTensor {
  readonly values: Float64Array;
  readonly magnitude: number;
}

export interface LlamaShape {
  readonly layers: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly queryHeads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly vocabulary: number;
  readonly epsilon: number;
  /** Radians per position of each pair. */
  readonly theta: Float64Array;
  readonly layout: 'adjacent' | 'half';
  readonly slidingWindow?: number;
  /** Norms of layers without weights and epsilon, before the products with o and down too, as in BitNet (arXiv 2310.11453). */
  readonly bareNorms?: true;
}

function tracked(size: number): Tracked {
  return { v: new Float64Array(size), e: new Float64Array(size) };
}

function sum(values: Float64Array): number {
  return values.reduce((a, b) => a + b, 0);
}

/** Keys and queries of one token before RoPE, for moments. */
export interface Observed {
  readonly layer: number;
  readonly q: Float64Array;
  readonly k: Float64Array;
}

export class ReferenceLlama {
  /** [layer][token], after RoPE: [kvHeads · headDim]. */
  private readonly keys: Tracked[][];
  private readonly values: Tracked[][];

  constructor(
    private readonly shape: LlamaShape,
    private readonly tensor: (name: string) => LlamaTensor | undefined,
    /** Whether products round activations to 8 bits. */
    private readonly int8 = false,
    private readonly observe: (observed: Observed) => void = () => undefined,
  ) {
    this.keys = Array.from({ length: shape.layers }, () => []);
    this.values = Array.from({ length: shape.layers }, () => []);
  }

  /** Logits [vocabulary] after one more token. */
  next(token: number): Tracked {
    const { hidden, layers, vocabulary } = this.shape;
    const embed = this.need('embed');
    const at = token * hidden;
    let x: Tracked = {
      v: embed.values.slice(at, at + hidden),
      e: new Float64Array(hidden).fill(2 * u * embed.magnitude),
    };
    for (let layer = 0; layer < layers; layer++) {
      x = add(x, this.attention(layer, this.norm(x, `layers.${layer}.attnNorm`)));
      x = add(x, this.feedForward(layer, this.norm(x, `layers.${layer}.ffnNorm`)));
    }
    const head = this.tensor('head') ?? embed;
    return this.multiply(head, this.norm(x, 'norm'), vocabulary);
  }

  private need(name: string): LlamaTensor {
    const tensor = this.tensor(name);
    if (!tensor) throw new Error(`The reference model lacks ${name}.`);
    return tensor;
  }

  private norm(x: Tracked, name: string): Tracked {
    if (this.shape.bareNorms && name !== 'norm') return this.bare(x);
    return rmsNorm(x, this.need(name).values, this.shape.epsilon);
  }

  /** What stands before o and down. */
  private bare(x: Tracked): Tracked {
    return this.shape.bareNorms ? rmsNorm(x, new Float64Array(x.v.length).fill(1), 0) : x;
  }

  private linear(name: string, x: Tracked, rows: number): Tracked {
    return this.multiply(this.need(name), x, rows);
  }

  private multiply(weight: LlamaTensor, input: Tracked, rows: number): Tracked {
    const columns = input.v.length;
    const x = this.int8 && weight.magnitude > 0 ? roundedToBytes(input) : input;
    const { magnitude: m } = weight;
    const out = tracked(rows);
    for (let r = 0; r < rows; r++) {
      let variance = 0;
      for (let k = 0; k < columns; k++) {
        const w = weight.values[r * columns + k]!;
        out.v[r]! += w * x.v[k]!;
        variance += (w * x.e[k]!) ** 2 + x.v[k]! ** 2 * u * u * (4 * m * m + (columns + 8) * (w * w + m * m));
      }
      out.e[r] = sqrt(variance);
    }
    return out;
  }

  private attention(layer: number, x: Tracked): Tracked {
    const { queryHeads, kvHeads, headDim, hidden, slidingWindow = Infinity } = this.shape;
    const name = (part: string) => `layers.${layer}.${part}`;
    const project = (part: string, heads: number) => {
      const y = addBias(this.linear(name(part), x, heads * headDim), this.tensor(name(`${part}Bias`)));
      const norm = this.tensor(name(`${part}Norm`));
      return norm ? joined(heads, (h) => rmsNorm(slice(y, h, headDim), norm.values, this.shape.epsilon)) : y;
    };
    const q = project('q', queryHeads);
    const k = project('k', kvHeads);
    const v = project('v', kvHeads);
    this.observe({ layer, q: q.v, k: k.v });
    const position = this.keys[layer]!.length;
    this.keys[layer]!.push(rounded16(joined(kvHeads, (h) => this.rotate(slice(k, h, headDim), position))));
    this.values[layer]!.push(rounded16(v));
    const first = max(0, position - slidingWindow + 1);
    const seen = (cache: Tracked[][], head: number) =>
      cache[layer]!.slice(first).map((token) => slice(token, head, headDim));
    const out = joined(queryHeads, (h) => {
      const kv = Math.floor((h * kvHeads) / queryHeads);
      return attend(this.rotate(slice(q, h, headDim), position), seen(this.keys, kv), seen(this.values, kv));
    });
    return this.linear(name('o'), this.bare(out), hidden);
  }

  private feedForward(layer: number, x: Tracked): Tracked {
    const { hidden, intermediate } = this.shape;
    const gate = this.linear(`layers.${layer}.gate`, x, intermediate);
    const up = this.linear(`layers.${layer}.up`, x, intermediate);
    const product = tracked(intermediate);
    for (let i = 0; i < intermediate; i++) {
      const sigmoid = 1 / (1 + Math.exp(-gate.v[i]!));
      const silu = gate.v[i]! * sigmoid;
      const slope = sigmoid + silu * (1 - sigmoid);
      product.v[i] = silu * up.v[i]!;
      product.e[i] = hypot(silu * up.e[i]!, up.v[i]! * slope * gate.e[i]!, 4 * u * product.v[i]!);
    }
    return this.linear(`layers.${layer}.down`, this.bare(product), hidden);
  }

  private rotate(x: Tracked, position: number): Tracked {
    const { theta, layout } = this.shape;
    const rope = { theta, layout, rotaryDims: 2 * theta.length };
    const out = { v: Float64Array.from(x.v), e: Float64Array.from(x.e) };
    for (let i = 0; i < theta.length; i++) {
      const [c, s] = [Math.cos(position * theta[i]!), Math.sin(position * theta[i]!)];
      const [a, b] = pairChannels(i, rope);
      const roundings = 2 * u * hypot(x.v[a]!, x.v[b]!);
      out.v[a] = x.v[a]! * c - x.v[b]! * s;
      out.v[b] = x.v[b]! * c + x.v[a]! * s;
      out.e[a] = hypot(c * x.e[a]!, s * x.e[b]!, roundings);
      out.e[b] = hypot(c * x.e[b]!, s * x.e[a]!, roundings);
    }
    return out;
  }
}

function slice(x: Tracked, index: number, size: number): Tracked {
  return {
    v: x.v.subarray(index * size, (index + 1) * size),
    e: x.e.subarray(index * size, (index + 1) * size),
  };
}

function joined(count: number, part: (index: number) => Tracked): Tracked {
  const parts = Array.from({ length: count }, (_, i) => part(i));
  return {
    v: Float64Array.from(parts.flatMap((p) => [...p.v])),
    e: Float64Array.from(parts.flatMap((p) => [...p.e])),
  };
}

function add(x: Tracked, y: Tracked): Tracked {
  const v = x.v.map((value, i) => value + y.v[i]!);
  return { v, e: x.e.map((error, i) => hypot(error, y.e[i]!, u * v[i]!)) };
}

function addBias(x: Tracked, bias: LlamaTensor | undefined): Tracked {
  return bias ? add(x, { v: bias.values, e: new Float64Array(x.v.length) }) : x;
}

function rmsNorm(x: Tracked, weight: Float64Array, epsilon: number): Tracked {
  const n = x.v.length;
  const mean = sum(x.v.map((value) => value * value)) / n + epsilon;
  const r = 1 / sqrt(mean);
  const rOff = (r / mean / n) * hypot(...x.v.map((value, i) => value * x.e[i]!));
  const v = x.v.map((value, i) => value * r * weight[i]!);
  return {
    v,
    e: x.e.map((error, i) => hypot(weight[i]! * error * r, weight[i]! * x.v[i]! * rOff, 3 * u * v[i]!)),
  };
}

function rounded16(x: Tracked): Tracked {
  return {
    v: x.v,
    e: x.e.map((error, i) => hypot(error, max(abs(x.v[i]!) * 2 ** -10, 2 ** -24) / sqrt(12))),
  };
}

function roundedToBytes(x: Tracked): Tracked {
  return {
    v: x.v,
    e: x.e.map((error, i) => {
      const group = x.v.subarray(i - (i % 32), i - (i % 32) + 32);
      const step = group.reduce((a, b) => max(a, abs(b)), 0) / 127;
      return hypot(error, step / sqrt(12));
    }),
  };
}

/** One query head over the tokens it sees. */
function attend(q: Tracked, keys: Tracked[], values: Tracked[]): Tracked {
  const D = q.v.length;
  const scale = 1 / sqrt(D);
  const logits = keys.map((k) => scale * sum(k.v.map((value, c) => value * q.v[c]!)));
  const largest = max(...logits);
  const delta = keys.map((k) => {
    const terms = k.v.map((value, c) =>
      hypot(q.v[c]! * k.e[c]!, value * q.e[c]!, sqrt(D + 20) * u * value * q.v[c]!),
    );
    return scale * hypot(...terms);
  });
  const weights = logits.map((logit) => Math.exp(logit - largest));
  const total = weights.reduce((a, b) => a + b, 0);
  const p = weights.map((weight) => weight / total);
  const out = tracked(D);
  for (let c = 0; c < D; c++) {
    values.forEach((value, j) => (out.v[c]! += p[j]! * value.v[c]!));
    const terms = values.map(({ v, e }, j) =>
      hypot(delta[j]! * (v[c]! - out.v[c]!), e[c]!, sqrt(values.length + 20) * u * v[c]!),
    );
    out.e[c] = hypot(...terms.map((term, j) => p[j]! * term));
  }
  return out;
}
