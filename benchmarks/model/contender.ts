/** Who is timed: one way of holding keys and values while a model runs. */
import { KvCache, schemeNamed, type Moments } from '../../lib';
import { type Activations, type Model } from '../../lib/model';
import { type Sequence } from '../../lib';

export interface Timing {
  readonly seconds: number;
  /** Of all threads of the process. */
  readonly processorSeconds: number;
}

/** One decoded token. */
export interface Step extends Timing {
  /** Seconds that went into each part, where the contender knows. */
  readonly parts?: { readonly products: number; readonly append: number; readonly attend: number };
}

export interface Contender {
  readonly name: string;
  readonly peer: boolean;
  /** Stored bits per number, without 16-bit windows. */
  readonly bitsPerValue: number;
  /** Appends tokens to the context. */
  prefill(tokens: Int32Array): Promise<Timing>;
  /** Decodes greedily after `token`; the context is afterwards what it was before. */
  decode(token: number, count: number): Promise<Step[]>;
  /** Bytes that the context takes; undefined where unknown. */
  cacheBytes(): number | undefined;
  close(): Promise<void>;
}

/** Wall and processor time since the call. */
export function stopwatch(): () => Timing {
  const [started, before] = [performance.now(), process.cpuUsage()];
  return () => {
    const { user, system } = process.cpuUsage(before);
    return { seconds: (performance.now() - started) / 1000, processorSeconds: (user + system) / 1e6 };
  };
}

function likeliest(logits: Float32Array): number {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i]! > logits[best]!) best = i;
  return best;
}

export class Ours implements Contender {
  readonly peer = false;

  private constructor(
    readonly name: string,
    readonly bitsPerValue: number,
    private readonly model: Model,
    private readonly cache: KvCache,
    private readonly context: Sequence,
    private readonly activations: Activations,
  ) {}

  static async create(
    model: Model,
    name: string,
    moments: Moments | undefined,
    tokens: number,
    activations: Activations,
  ): Promise<Ours> {
    const scheme = schemeNamed(name, moments);
    const { totalBytes } = KvCache.estimate({ ...model.cacheShape(), scheme, tokens });
    const cache = await model.createCache({ scheme, memory: 2 * totalBytes + 2 ** 26 });
    const bits = scheme.bitsPerValue(model.config.headDim);
    return new Ours(name, bits, model, cache, cache.sequence(), activations);
  }

  async prefill(tokens: Int32Array): Promise<Timing> {
    const { activations } = this;
    const elapsed = stopwatch();
    await this.model.forward(this.context, tokens, { activations, chunk: tokens.length, logits: 'last' });
    return elapsed();
  }

  async decode(token: number, count: number): Promise<Step[]> {
    const { activations } = this;
    using branch = await this.context.fork();
    const steps: Step[] = [];
    for (let i = 0, next = token; i < count; i++) {
      const elapsed = stopwatch();
      next = likeliest(await this.model.forward(branch, [next], { activations }));
      const time = elapsed();
      const { products, append, attend } = this.model.lastPass;
      steps.push({ ...time, parts: { products, append, attend } });
    }
    return steps;
  }

  cacheBytes(): number {
    return this.cache.stats().usedBytes;
  }

  async close(): Promise<void> {
    this.cache.dispose();
    await Promise.resolve();
  }
}
