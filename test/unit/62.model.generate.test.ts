/** Generation on small random models: its loop against the plainest one, stop strings, ends, failures, lifetimes. */
import { KvCache, schemes } from '../../lib';
import { Model, type GenerateOptions, type GeneratedToken, type Prompt } from '../../lib/model';
import { memorySource } from '../../lib/model/bytes';
import { ChatTemplate } from '../../lib/model/chat';
import { parseGguf } from '../../lib/model/gguf';
import { Sampler, samplerSettings } from '../../lib/model/sampler';
import { StopFilter } from '../../lib/model/stop';
import { ggufTokenizer } from '../../lib/model/vocabulary';
import { failure } from '../support/failures';
import { tinyTokens, tinyVocabulary, writeGguf } from '../support/gguf';
import { modelConfig, randomModel, removeModels } from '../support/model';
import { backendOf, disposeBackends } from '../support/native';
import { Random } from '../support/random';

const random = new Random(11);
const vocabulary = tinyTokens.length;
const tokenizer = ggufTokenizer(parseGguf(memorySource(writeGguf({ metadata: tinyVocabulary }))));
const chat = new ChatTemplate(
  'tiny',
  '{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}',
);
const weights = randomModel(modelConfig({ vocabulary, contextLength: 300, eos: [2] }));
const file = { ...weights, tokenizer, chat };
const model = Model.openSync(backendOf(), file);
const sampled: GenerateOptions = { temperature: 1, seed: 3, eos: [], scheme: schemes.fp16() };

afterAll(() => {
  disposeBackends();
  removeModels();
});

async function all(tokens: AsyncIterable<GeneratedToken>): Promise<GeneratedToken[]> {
  const out: GeneratedToken[] = [];
  for await (const token of tokens) out.push(token);
  return out;
}

const ids = (tokens: readonly GeneratedToken[]) => tokens.map(({ id }) => id);

/** One forward pass per token, one sampler, nothing else. */
function plainly(prompt: readonly number[], count: number, options: GenerateOptions, stream = 0): number[] {
  using cache = model.createCacheSync({ scheme: options.scheme ?? schemes.fp16(), memory: '64MiB' });
  const sequence = cache.sequence();
  const sampler = new Sampler(samplerSettings(options), stream);
  const text = [...prompt];
  for (let i = 0; i < count; i++)
    text.push(sampler.next(model.forwardSync(sequence, i === 0 ? prompt : text.slice(-1)), text));
  return text.slice(prompt.length);
}

describe('stop strings', () => {
  /** The definition: character by character, the text ends where one is complete. */
  function definition(text: string, stops: readonly string[]): string {
    for (let end = 1; end <= text.length; end++) {
      const found = stops.filter((stop) => text.slice(0, end).endsWith(stop));
      if (found.length > 0) return text.slice(0, end - Math.max(...found.map(({ length }) => length)));
    }
    return text;
  }

  test('however the text is cut, exactly the text before the first one, and never more', () => {
    const word = (most: number) => Array.from({ length: 1 + random.below(most) }, () => random.pick(['a', 'b', 'é'])).join(''); // prettier-ignore
    let stopped = 0;
    for (let round = 0; round < 3000; round++) {
      const stops = Array.from({ length: random.below(4) }, () => word(5));
      const text = word(30);
      const expected = definition(text, stops);
      const filter = new StopFilter(stops);
      let out = '';
      for (let at = 0; at < text.length;) {
        const length = 1 + random.below(4);
        out += filter.push(text.slice(at, (at += length)));
        expect(expected.startsWith(out)).toBe(true);
      }
      out += filter.end();
      expect(out).toBe(expected);
      expect(filter.stop === undefined).toBe(expected === text);
      if (filter.stop !== undefined) stopped++;
    }
    expect(stopped).toBeGreaterThan(1000);
  });

  test('nothing is held longer than it must be', () => {
    const filter = new StopFilter(['abc', 'bd']);
    expect(['x', 'a', 'b', 'b', 'd', 'y'].map((part) => filter.push(part))).toEqual([
      'x',
      '',
      '',
      'ab',
      '',
      '',
    ]);
    expect([filter.stop, filter.end()]).toEqual(['bd', '']);
  });

  test.each([[''], ['\ud800'], [5]])('%j is none', (stop) =>
    expect(() => new StopFilter([stop as string])).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT', 'stop')),
  );
});

describe('one prompt', () => {
  const prompt = 'hello world';
  const tokens = [...tokenizer.encode(prompt)];

  test.each<[string, GenerateOptions]>([
    ['greedy', { eos: [], scheme: schemes.fp16() }],
    ['sampled', sampled],
    ['sampled with everything', { ...sampled, topK: 40, topP: 0.9, minP: 0.01, repeatPenalty: 1.3 }],
    ['through packed bits', { ...sampled, scheme: schemes.rotated({ keyBits: 3, valueBits: 3 }) }],
  ])('%s: the tokens of a plain loop', async (_, options) => {
    const got = await all(model.generate(prompt, { ...options, maxTokens: 150 }));
    expect(ids(got)).toEqual(plainly(tokens, 150, options));
    expect(got.every(({ index, seconds }) => index === 0 && seconds > 0)).toBe(true);
  });

  test('texts of the tokens join to the whole text, without half characters', async () => {
    let broken = 0;
    for (let seed = 0; seed < 8; seed++) {
      const generation = model.generate(tokens, { ...sampled, seed, maxTokens: 40 });
      const got = await all(generation);
      const { text, ids: out, reason } = await generation.finish();
      expect(got.map((token) => token.text).join('')).toBe(text);
      expect(text).toBe(tokenizer.decode(out, { continues: true }));
      expect(text).not.toMatch(/\p{Surrogate}/u);
      expect([out.length, reason]).toEqual([40, 'maxTokens']);
      broken += got.filter((token, i) => token.text !== tokenizer.decode([out[i]!])).length;
    }
    expect(broken).toBeGreaterThan(0); // some tokens were parts of characters
  });

  test('a character that the prompt begins is completed', async () => {
    const [first] = tokenizer.encode('\u00e9'); // the first of two bytes
    let completed = 0;
    for (let seed = 0; seed < 40; seed++) {
      const { ids: out, text } = await model.generate([first!], { ...sampled, seed, maxTokens: 2 }).finish();
      expect(text).toBe(tokenizer.decode([first!, ...out]));
      if (/^[\u00c0-\u00ff]/.test(text)) completed++;
    }
    expect(completed).toBeGreaterThan(0);
  });

  test('a stop string over several tokens ends the text before it, and nothing of it is yielded', async () => {
    const free = await model.generate(prompt, { ...sampled, maxTokens: 120 }).finish();
    const starts = free.ids.map((_, i) => tokenizer.decode(free.ids.slice(0, i), { continues: true }).length);
    for (const at of [5, 30, 70]) {
      const stop = free.text.slice(starts[at]! - 1, starts[at]! + 3);
      const generation = model.generate(prompt, { ...sampled, maxTokens: 120, stop: ['\u0001never', stop] });
      const got = await all(generation);
      const summary = await generation.finish();
      expect(summary).toMatchObject({
        reason: 'stop',
        stop,
        text: free.text.slice(0, free.text.indexOf(stop)),
      });
      expect(got.map(({ text }) => text).join('')).toBe(summary.text);
      expect(summary.ids).toEqual(free.ids.slice(0, summary.ids.length));
    }
    const held = await model.generate(prompt, { ...sampled, maxTokens: 120, stop: `${free.text}!` }).finish();
    expect(held).toMatchObject({ text: free.text, reason: 'maxTokens' }); // all of it held back to the end
  });

  test('ends: a token of the end, the limit, the context', async () => {
    const free = await model.generate(prompt, { ...sampled, maxTokens: 20 }).finish();
    const eos = free.ids[7]!;
    const at = free.ids.indexOf(eos);
    const ended = await model.generate(prompt, { ...sampled, eos: [eos] }).finish();
    expect(ended).toMatchObject({ reason: 'eos', ids: free.ids.slice(0, at + 1) });
    expect(ended.text).toBe(tokenizer.decode(free.ids.slice(0, at), { continues: true }));
    const long = await model.generate(prompt, { ...sampled, maxTokens: 1000 }).finish();
    expect([long.reason, long.ids.length]).toEqual(['context', 300 - tokens.length + 1]);
    const full = await model.generate(new Array<number>(300).fill(5), sampled).finish();
    expect([full.reason, full.ids.length, full.promptTokens]).toEqual(['context', 1, 300]);
  });

  test('chunks of the prompt, progress, cost', async () => {
    const long = Array.from({ length: 100 }, () => random.below(vocabulary));
    const progress: [number, number][] = [];
    const options = { ...sampled, scheme: schemes.rotated({ keyBits: 4, valueBits: 2 }), maxTokens: 5 };
    const summary = await model.generate(long, {
      ...options,
      chunk: 32,
      onPrefill: (...now) => progress.push(now),
    }).finish(); // prettier-ignore
    expect(progress).toEqual([[32, 100], [64, 100], [96, 100], [100, 100]]); // prettier-ignore
    expect(summary.prefill.tokens).toBe(100);
    expect(summary.decode.tokens).toBe(4);
    expect(summary.tokenSeconds).toHaveLength(5);
    expect(summary.seed).toBe(3);
    expect(summary.bitsPerValue).toBe(3.25);
    const { config } = model;
    const values = 2 * config.layers * config.kvHeads * config.headDim * 104;
    expect(summary.bitsPerValueInAll).toBeCloseTo((8 * summary.cacheBytes) / values, 9);
    expect(summary.bitsPerValueInAll).toBeGreaterThan(3.25);
    using cache = model.createCacheSync({ scheme: options.scheme, memory: '8MiB' });
    using twin = cache.sequence();
    model.forwardSync(twin, [...long, ...summary.ids.slice(0, 4)], { logits: 'none' });
    expect(summary.cacheBytes).toBe(cache.stats().usedBytes);
  });

  test('conversations go through the template, with control tokens', async () => {
    const messages = [{ role: 'user', content: 'hello' }];
    const expected = [1, tokenizer.encode('hello')[0]!, 2];
    const got = await all(model.generate(messages, { ...sampled, maxTokens: 9 }));
    expect(ids(got)).toEqual(plainly(expected, 9, sampled));
  });

  test('a sequence goes on, and lacks the last token only', async () => {
    using cache = model.createCacheSync({
      scheme: schemes.rotated({ keyBits: 4, valueBits: 4 }),
      memory: '8MiB',
    });
    using sequence = cache.sequence();
    const first = await model.generate(tokens, { ...sampled, sequence, maxTokens: 6 }).finish();
    expect(sequence.length()).toBe(tokens.length + 5);
    expect(first.bitsPerValueInAll).toBeUndefined();
    const second = await model.generate([first.ids.at(-1)!], { ...sampled, sequence, maxTokens: 4 }).finish();
    using twin = cache.sequence();
    const logits = model.forwardSync(twin, [...tokens, ...first.ids]);
    expect(second.ids[0]).toBe(new Sampler(samplerSettings(sampled)).next(logits, []));
    expect([sequence.disposed, cache.stats().sequences]).toEqual([false, 2]);
  });
});

describe('many prompts', () => {
  const prompts: Prompt[] = ['hello', [7, 8, 9], ' world world', [{ role: 'user', content: 'hello' }]];

  test('each text is what it would be alone; they end at different times', async () => {
    const options = { ...sampled, eos: [40, 41, 42, 43, 44, 45], maxTokens: 60 };
    const generation = model.generateBatch(prompts, options);
    const got = await all(generation);
    const { texts, decode } = await generation.finish();
    const lengths = new Set(texts.map((text) => text.ids.length));
    expect(lengths.size).toBeGreaterThan(1);
    expect(decode.tokens).toBe(got.length - prompts.length);
    texts.forEach((text, index) => {
      const own = got.filter((token) => token.index === index);
      expect(ids(own)).toEqual(text.ids);
      expect(own.map((token) => token.text).join('')).toBe(text.text);
      const prompt = [[...tokenizer.encode('hello')], [7, 8, 9], [...tokenizer.encode(' world world')], [1, ...tokenizer.encode('hello'), 2]][index]!; // prettier-ignore
      expect(text.ids).toEqual(plainly(prompt, text.ids.length, options, index));
    });
    const alone = await model.generate(prompts[0]!, options).finish();
    expect(alone.ids).toEqual(texts[0]!.ids);
  });

  test('they share a step: as many passes as the longest text', async () => {
    const passes = jest.spyOn(model, 'forwardBatch');
    await model.generateBatch(prompts, { ...sampled, maxTokens: 10 }).finish();
    expect(passes).toHaveBeenCalledTimes(prompts.length + 9);
    passes.mockRestore();
  });
});

describe('nothing is left behind', () => {
  const cacheOf = () => model.createCacheSync({ scheme: schemes.fp16(), memory: '8MiB' });

  test('after leaving the loop, an error of the caller, await using, or never starting', async () => {
    using cache = cacheOf();
    const none = () => expect(cache.stats()).toMatchObject({ sequences: 0, usedBytes: 0 });
    const options = { ...sampled, cache };
    const left = model.generateBatch([[5], [6]], options);
    for await (const { index } of left) if (index === 1) break;
    none();
    const { texts } = await left.finish();
    expect(texts.map(({ reason, ids: out }) => [reason, out.length])).toEqual([['unfinished', 1], ['unfinished', 1]]); // prettier-ignore
    const failing = async () => {
      for await (const _ of model.generate([5], options)) throw new Error('mine');
    };
    await expect(failing()).rejects.toThrow('mine');
    none();
    {
      await using generation = model.generate([5], options);
      await generation.next();
      expect(cache.stats().sequences).toBe(1);
    }
    none();
    await model.generate([5], options).return();
    await model.generate([5], { ...options, maxTokens: 3 }).finish();
    none();
  });

  test('an abort rejects with the reason: before, between tokens, in the prompt', async () => {
    using cache = cacheOf();
    const controller = new AbortController();
    const options = { ...sampled, cache, signal: controller.signal };
    const generation = model.generate([5], options);
    await generation.next();
    controller.abort(new Error('enough'));
    await expect(generation.next()).rejects.toThrow('enough');
    expect(cache.stats()).toMatchObject({ sequences: 0, usedBytes: 0 });
    await expect(model.generate([5], options).next()).rejects.toThrow('enough');
    const during = new AbortController();
    const prefill = model.generate(new Array<number>(40).fill(5), {
      ...sampled,
      ...{ cache, signal: during.signal, chunk: 4 },
      onPrefill: () => during.abort(new Error('in the prompt')),
    });
    await expect(prefill.next()).rejects.toThrow('in the prompt');
    expect((await prefill.finish()).ids).toEqual([]);
    expect(cache.stats()).toMatchObject({ sequences: 0, usedBytes: 0 });
  });

  test('a budget that is used up', async () => {
    const generation = model.generate([5], {
      ...sampled,
      maxTokens: 200,
      memory: 200_000,
      scheme: schemes.fp16(),
    });
    await expect(generation.finish()).rejects.toThrow(failure('ERR_INNERKV_OUT_OF_MEMORY'));
    expect((await generation.finish()).reason).toBe('unfinished');
  });

  test.each([
    schemes.fp16(),
    schemes.innerq({ preset: 'hybrid' }),
    schemes.rotated({ keyBits: 2, valueBits: 2 }),
  ])('the budget that is taken by default is enough: $name', async (scheme) => {
    const batch = model.generateBatch([[5], [6], [7]], { ...sampled, scheme, maxTokens: 400 });
    expect((await batch.finish()).texts.map(({ reason }) => reason)).toEqual([
      'context',
      'context',
      'context',
    ]);
  });
});

describe('refused at once', () => {
  const invalid = (text: string) => failure('ERR_INNERKV_INVALID_ARGUMENT', text);
  test.each<[string, unknown, object]>([
    ['at least one token', '', {}],
    ['at least one token', [], {}],
    ['token must be', [vocabulary], {}],
    ['exceed the model', new Array(301).fill(5), {}],
    ['A prompt must be', { text: 'x' }, {}],
    ['maxTokens', 'hello', { maxTokens: 0 }],
    ['temperature', 'hello', { temperature: -1 }],
    ['stop string', 'hello', { stop: ['a', ''] }],
    ['chunk', 'hello', { chunk: 0 }],
  ])('%s', (text, prompt, options) =>
    expect(() => model.generate(prompt as Prompt, options)).toThrow(invalid(text)),
  );

  test('no prompts; a sequence of another cache; a model without tokenizer or template', async () => {
    expect(() => model.generateBatch([])).toThrow(invalid('at least one prompt'));
    using one = model.createCacheSync({ scheme: schemes.fp16(), memory: '1MiB' });
    using other = model.createCacheSync({ scheme: schemes.fp16(), memory: '1MiB' });
    expect(() => model.generate([5], { sequence: one.sequence(), cache: other })).toThrow(
      invalid('another cache'),
    );
    using bare = Model.openSync(backendOf(), weights);
    const unsupported = (text: string) => failure('ERR_INNERKV_UNSUPPORTED', text);
    expect(() => bare.generate('hello')).toThrow(unsupported('tokenizer'));
    expect(() => bare.generate([5], { stop: 'x' })).toThrow(unsupported('tokenizer'));
    expect(await bare.generate([5], { maxTokens: 4, eos: [] }).finish()).toMatchObject({
      text: '',
      reason: 'maxTokens',
    });
    using silent = Model.openSync(backendOf(), { ...weights, tokenizer });
    expect(() => silent.generate([{ role: 'user', content: 'x' }])).toThrow(unsupported('chat template'));
    using cache = KvCache.createSync(backendOf(), {
      ...model.cacheShape(),
      layers: 3,
      scheme: schemes.fp16(),
      memory: '1MiB',
    });
    await expect(model.generate([5], { cache }).finish()).rejects.toThrow(invalid('shape'));
  });
});
