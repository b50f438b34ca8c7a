/** Calibration: statistics of a model's keys and queries from a text, or from the prompt at hand. */
import { type AbortOptions } from '../abort';
import { KvCache } from '../cache';
import { invalid } from '../errors';
import { type RecordedMoments } from '../model/moments';
import { type Model, type Tokens } from '../model/runner';
import { schemes, type CalibratedOptions, type DescribedScheme } from '../schemes';
import { checkInteger } from '../tensor';

export interface CalibrateOptions extends AbortOptions {
  /** Tokens to observe at most. Default 2,048. */
  readonly tokens?: number;
  /** Positions left out at the beginning of each context: attention sinks are unlike all other keys. Default 4. */
  readonly skip?: number;
  readonly onProgress?: (done: number, total: number) => void;
}

const CHUNK = 512;

/**
 * Moments of the first tokens of a text, per layer and KV head and before RoPE, from a run with float32 activations over a
 * 16-bit cache. A text longer than the model's context is cut into contexts.
 * @throws ERR_INNERKV_INVALID_ARGUMENT when no token is left after `skip`; the reason of the signal.
 */
export async function calibrate(
  model: Model,
  text: Tokens,
  options: CalibrateOptions = {},
): Promise<RecordedMoments> {
  const { skip = 4, onProgress, signal } = options;
  const most = checkInteger(options.tokens ?? 2048, 1, 2 ** 30, 'tokens');
  const tokens = Int32Array.from(text).subarray(0, most);
  const context = Math.min(model.config.contextLength, tokens.length);
  if (context <= skip) throw invalid(`Calibration needs more than ${skip} tokens, not ${context}.`);
  const shape = { ...model.cacheShape(), scheme: schemes.fp16() };
  const { totalBytes } = KvCache.estimate({ ...shape, tokens: context });
  using cache = await model.createCache({ scheme: shape.scheme, memory: 2 * totalBytes + 2 ** 24 });
  using recorder = model.moments({ skip });
  for (let first = 0; first < tokens.length; first += context) {
    using sequence = cache.sequence();
    const end = Math.min(first + context, tokens.length);
    for (let at = first; at < end; at += CHUNK) {
      const chunk = tokens.subarray(at, Math.min(at + CHUNK, end));
      const run = { observe: recorder, logits: 'none', activations: 'float32' } as const;
      await model.forward(sequence, chunk, { ...run, ...(signal && { signal }) });
      onProgress?.(at + chunk.length, tokens.length);
    }
  }
  return await recorder.read(signal && { signal });
}

export interface PromptOptions extends CalibratedOptions, AbortOptions {
  /** Tokens of the prompt that are observed. Default 512. */
  readonly tokens?: number;
}

/**
 * The calibrated scheme for one text without any file: its moments are those of the prompt's first tokens, which cost one more
 * prefill. What is cached with it must be of the same kind of text: one scheme, and so one cache, for each prompt, or for a
 * prefix that many prompts share. With 512 tokens the error of keys is about twice that of moments from 2,048.
 */
export async function calibratedFromPrompt(
  model: Model,
  prompt: Tokens,
  { tokens = 512, signal, ...bits }: PromptOptions,
): Promise<DescribedScheme> {
  const moments = await calibrate(model, prompt, { tokens, ...(signal && { signal }) });
  const scheme = schemes.calibrated(moments, bits);
  return {
    name: scheme.name.replace(/^calibrated/, 'prompt'),
    key: scheme.key,
    value: scheme.value,
    layer: (...of) => scheme.layer(...of),
    describe: () => `${scheme.describe()}, calibrated on the first ${tokens} tokens of the prompt`,
    bitsPerValue: (headDim) => scheme.bitsPerValue(headDim),
  };
}
