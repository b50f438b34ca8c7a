/** The truth of the demo: causal attention in float64, straight from the definition, and the distance to it. */
import { type RecordedLayer, type Recording } from './recording';

/** One layer; all arrays begin at query `first`. */
export interface ExactLayer {
  /** [queries, queryHeads, headDim]. */
  readonly out: Float64Array;
  /** log p of every visible token, [queries, queryHeads, tokens]; later tokens are unused. */
  readonly logP: Float64Array;
}

/** Attention of the queries `first` … tokens − 1; `done` is told after every layer. */
export function exactAttention(
  recording: Recording,
  first: number,
  done: () => void = () => undefined,
): ExactLayer[] {
  return recording.layers.map((layer) => {
    const exact = exactLayer(recording, layer, first);
    done();
    return exact;
  });
}

function exactLayer({ tokens, shape }: Recording, { k, v, q }: RecordedLayer, first: number): ExactLayer {
  const { queryHeads, kvHeads, headDim } = shape;
  const queries = tokens - first;
  const out = new Float64Array(queries * queryHeads * headDim);
  const logP = new Float64Array(queries * queryHeads * tokens);
  for (let query = 0; query < queries; query++)
    for (let head = 0; head < queryHeads; head++) {
      const row = query * queryHeads + head;
      const kvHead = Math.floor((head * kvHeads) / queryHeads);
      const visible = first + query + 1;
      const logits = logP.subarray(row * tokens, row * tokens + visible);
      const qAt = ((first + query) * queryHeads + head) * headDim;
      for (let j = 0; j < visible; j++) {
        const kAt = (j * kvHeads + kvHead) * headDim;
        let dot = 0;
        for (let c = 0; c < headDim; c++) dot += q[qAt + c]! * k[kAt + c]!;
        logits[j] = dot / Math.sqrt(headDim);
      }
      const lse = logSumExp(logits);
      for (let j = 0; j < visible; j++) {
        logits[j]! -= lse;
        const p = Math.exp(logits[j]!);
        const vAt = (j * kvHeads + kvHead) * headDim;
        for (let c = 0; c < headDim; c++) out[row * headDim + c]! += p * v[vAt + c]!;
      }
    }
  return { out, logP };
}

function logSumExp(logits: ArrayLike<number>): number {
  let largest = -Infinity;
  for (let j = 0; j < logits.length; j++) largest = Math.max(largest, logits[j]!);
  let sum = 0;
  for (let j = 0; j < logits.length; j++) sum += Math.exp(logits[j]! - largest);
  return largest + Math.log(sum);
}

export interface Fidelity {
  /** Root of error energy over output energy, per layer and averaged, so that no layer drowns the others. */
  readonly relativeError: number;
  readonly relativeErrorOfLayers: readonly number[];
  /** Mean cosine of a query head's output and the exact one. */
  readonly cosine: number;
  /** Mean KL divergence of attention probabilities, exact against scheme, in nats. */
  readonly kl: number;
}

/** Collects the outputs of a scheme and says how far they are from the truth. */
export class FidelityMeter {
  private readonly error: Float64Array;
  private readonly energy: Float64Array;
  private cosines = 0;
  private divergence = 0;
  private rows = 0;

  constructor(
    private readonly recording: Recording,
    private readonly exact: readonly ExactLayer[],
    private readonly first: number,
  ) {
    this.error = new Float64Array(exact.length);
    this.energy = new Float64Array(exact.length);
  }

  /** Output [queryHeads, headDim] and scaled logits [queryHeads, token + 1] of the query at `token`. */
  add(layer: number, token: number, out: Float32Array, logits: Float32Array): void {
    const { queryHeads, headDim } = this.recording.shape;
    const { tokens } = this.recording;
    const truth = this.exact[layer]!;
    const visible = token + 1;
    for (let head = 0; head < queryHeads; head++) {
      const row = (token - this.first) * queryHeads + head;
      let [error, energy, own, dot] = [0, 0, 0, 0];
      for (let c = 0; c < headDim; c++) {
        const a = truth.out[row * headDim + c]!;
        const b = out[head * headDim + c]!;
        error += (b - a) ** 2;
        energy += a * a;
        own += b * b;
        dot += a * b;
      }
      this.error[layer]! += error;
      this.energy[layer]! += energy;
      this.cosines += dot / Math.sqrt(energy * own);
      const ours = logits.subarray(head * visible, (head + 1) * visible);
      const lse = logSumExp(ours);
      for (let j = 0; j < visible; j++) {
        const logP = truth.logP[row * tokens + j]!;
        this.divergence += Math.exp(logP) * (logP - (ours[j]! - lse));
      }
      this.rows++;
    }
  }

  result(): Fidelity {
    const relativeErrorOfLayers = [...this.error].map((error, layer) =>
      Math.sqrt(error / this.energy[layer]!),
    );
    return {
      relativeError:
        relativeErrorOfLayers.reduce((sum, error) => sum + error, 0) / relativeErrorOfLayers.length,
      relativeErrorOfLayers,
      cosine: this.cosines / this.rows,
      kl: this.divergence / this.rows,
    };
  }
}
