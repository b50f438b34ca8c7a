import { writeFileSync } from 'node:fs';
import { encodeMoments, readMoments, schemes, KvCache, type Moments } from '../../lib';
import { calibrate, calibratedFromPrompt, leadingTokens } from '../../lib/eval';
import { Model, openModel } from '../../lib/model';
import { parseMoments } from '../../lib/schemes/moments';
import { encodeSafetensors, parseSafetensors } from '../../lib/schemes/safetensors';
import { failure } from '../support/failures';
import { tinyGguf } from '../support/gguf';
import { modelConfig, randomModel, removeModels, temporaryFile } from '../support/model';
import { backendOf, disposeBackends } from '../support/native';
import { Random } from '../support/random';

afterAll(() => {
  disposeBackends();
  removeModels();
});

const text = (() => {
  const random = new Random(71);
  return Int32Array.from({ length: 200 }, () => random.below(40));
})();
const bits = { keyBits: 4, valueBits: 4 } as const;
const open = (seed = 1, changes = {}) =>
  Model.openSync(backendOf('', 2), randomModel(modelConfig({ layers: 1, ...changes }), 'F32', seed));
const invalid = (message: string) => failure('ERR_INNERKV_INVALID_ARGUMENT', message);

async function file(moments: Moments): Promise<string> {
  const path = temporaryFile('tiny.calib.safetensors');
  writeFileSync(path, encodeMoments(moments, { text: 'random' }));
  return Promise.resolve(path);
}

describe('a file of moments', () => {
  test('is read back as it was measured, rounded to float32, with its origin', async () => {
    using model = open();
    const moments = await calibrate(model, text, { tokens: 100 });
    expect(moments.origin).toEqual({
      ...{ model: model.identity.name, fingerprint: model.identity.fingerprint, tokens: 96 },
      rope: model.config.rope,
    });
    const read = readMoments(await file(moments));
    expect(read.origin).toEqual(moments.origin);
    for (const [layer, heads] of moments.layers)
      heads.forEach((head, h) => {
        for (const part of ['keyMean', 'keyMoment', 'queryMoment'] as const)
          expect(read.layers.get(layer)![h]![part]).toEqual(Float32Array.from(head[part]));
      });
  });

  test('serves its own model, wherever that lies, and no other', async () => {
    using model = open();
    const path = await file(await calibrate(model, text));
    const scheme = schemes.calibrated(path, bits);
    const cacheOf = (other: Model) => other.createCacheSync({ scheme, memory: '64MiB' });
    using again = open();
    cacheOf(model).dispose();
    cacheOf(again).dispose();
    using other = open(2);
    expect(() => cacheOf(other)).toThrow(invalid('of another model'));
    await expect(other.createCache({ scheme, memory: '64MiB' })).rejects.toThrow(invalid('of another model'));
    // The same without a file.
    const inMemory = schemes.calibrated(await calibrate(model, text), bits);
    expect(() => other.createCacheSync({ scheme: inMemory, memory: '64MiB' })).toThrow(
      invalid('another model'),
    );
  });

  test('without a model, RoPE and shape are compared', async () => {
    using model = open();
    const scheme = schemes.calibrated(await file(await calibrate(model, text)), bits);
    const shape = { ...model.cacheShape(), scheme, memory: '64MiB', model: undefined };
    const create = (changes: object) => {
      const { model: _, ...rest } = { ...shape, ...changes };
      KvCache.createSync(model.backend, rest).dispose();
    };
    create({});
    create({
      rope: {
        base: 1,
        layout: 'adjacent',
        theta: Float64Array.from({ length: 32 }, (_, i) => 10000 ** (-i / 32)),
      },
    });
    expect(() => create({ rope: { base: 500, layout: 'adjacent' } })).toThrow(invalid('rotary embedding'));
    expect(() => create({ rope: { base: 10000, layout: 'half' } })).toThrow(invalid('rotary embedding'));
    expect(() => create({ kvHeads: 4 })).toThrow(invalid('2 KV heads of 64'));
  });

  test('any damaged byte is noticed, or changes nothing', async () => {
    using model = open(1, { headDim: 64, kvHeads: 1, queryHeads: 1 });
    const moments = await calibrate(model, text.subarray(0, 20));
    const bytes = encodeMoments(moments);
    const whole = JSON.stringify([...parseMoments(parseSafetensors(bytes)).layers.get(0)!]);
    const header = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
    // All of the header, and some of the numbers.
    const places = Array.from({ length: bytes.length }, (_, i) => i).filter(
      (i) => i < header || i % 397 === 0,
    );
    let noticed = 0;
    for (const at of places)
      for (const flip of [1, 0x20, 0x80]) {
        const damaged = bytes.with(at, bytes[at]! ^ flip);
        try {
          const { layers, origin } = parseMoments(parseSafetensors(damaged));
          expect([JSON.stringify([...layers.get(0)!]), origin]).toEqual([whole, moments.origin]);
        } catch (error) {
          expect(error).toEqual(failure('ERR_INNERKV_CORRUPT'));
          noticed++;
        }
      }
    expect(noticed).toBeGreaterThan(0.95 * 3 * places.length);
    for (const length of [0, 7, header, bytes.length - 1])
      expect(() => parseMoments(parseSafetensors(bytes.slice(0, length)))).toThrow(
        failure('ERR_INNERKV_CORRUPT'),
      );
  });

  test('a checksum that somebody computed anew does not help wrong metadata', async () => {
    using model = open();
    const { origin, ...moments } = await calibrate(model, text.subarray(0, 20));
    for (const change of [
      { fingerprint: 'abc' },
      { tokens: -1 },
      { rope: {} },
      { rope: { base: -1, layout: 'half' } },
      { rope: { base: 1, layout: 'half', theta: Array.from({ length: 33 }, () => 1) } },
    ]) {
      const bytes = encodeMoments({ ...moments, origin: { ...origin, ...(change as object) } });
      expect(() => parseMoments(parseSafetensors(bytes))).toThrow(failure('ERR_INNERKV_CORRUPT'));
    }
    const parsed = parseSafetensors(encodeMoments({ ...moments, origin }));
    const { sha256: _, ...metadata } = Object.fromEntries(parsed.metadata);
    const bare = new Map([['x', { shape: [1], data: Float32Array.of(1) }]]);
    expect(() => parseMoments(parseSafetensors(encodeSafetensors(bare, metadata)))).toThrow(
      failure('ERR_INNERKV_CORRUPT', 'checksum'),
    );
  });
});

describe('what is observed', () => {
  test('the first tokens of the text, whatever the chunks; contexts of long texts', async () => {
    using model = open();
    const part = text.subarray(0, 60);
    const progress: number[][] = [];
    const moments = await calibrate(model, part, {
      onProgress: (done, total) => progress.push([done, total]),
    });
    const limited = await calibrate(model, text, { tokens: 60 });
    expect(limited.layers).toEqual(moments.layers);
    expect(progress).toEqual([[60, 60]]);
    // A context of 100 has its sinks left out in both halves of 200 tokens.
    using short = open(1, { contextLength: 100 });
    expect((await calibrate(short, text)).tokens).toBe(192);
  });

  test('bad input and an abort', async () => {
    using model = open();
    await expect(calibrate(model, text.subarray(0, 4))).rejects.toThrow(invalid('more than 4 tokens'));
    await expect(calibrate(model, text, { tokens: 0 })).rejects.toThrow(invalid('tokens'));
    await expect(calibrate(model, [1000, ...text])).rejects.toThrow(invalid('token'));
    const signal = AbortSignal.abort(new Error('enough'));
    await expect(calibrate(model, text, { signal })).rejects.toThrow('enough');
  });

  test('the prompt: the same scheme as from the moments of its first tokens', async () => {
    using model = open();
    const scheme = await calibratedFromPrompt(model, text, { ...bits, tokens: 80 });
    expect(scheme.name).toBe('prompt-k4v4');
    expect(scheme.describe()).toContain('first 80 tokens');
    const other = schemes.calibrated(await calibrate(model, text, { tokens: 80 }), bits);
    const layer = (one: typeof scheme) => one.layer(0, model.cacheShape(), { sink: 4, recent: 8 });
    expect(layer(scheme)).toEqual(layer(other));
    expect(scheme.bitsPerValue(64)).toBe(other.bitsPerValue(64));
  });
});

test('the beginning of a text as tokens is the beginning of its tokens', () => {
  const path = temporaryFile('tiny.gguf');
  writeFileSync(path, tinyGguf());
  const { tokenizer } = openModel(path);
  const words = 'the quick brown fox says hello to the other one. '.repeat(200);
  const all = tokenizer.encode(words);
  for (const count of [1, 100, 1000])
    expect(leadingTokens(tokenizer, words, count)).toEqual(all.slice(0, count));
  expect(leadingTokens(tokenizer, words, 1e9)).toEqual(all);
  expect(leadingTokens(tokenizer, words, Infinity)).toEqual(all);
});
