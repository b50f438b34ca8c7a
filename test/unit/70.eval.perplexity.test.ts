import { schemes, type DescribedScheme } from '../../lib';
import {
  calibratedFromPrompt,
  perplexity,
  planOf,
  type Contender,
  type PerplexityOptions,
} from '../../lib/eval';
import { compare, distributionOf } from '../../lib/eval/compare';
import { layerSchemes } from '../../lib/eval/perplexity';
import { tokensFor, windowsOf } from '../../lib/eval/protocols';
import { Model, type ModelConfig } from '../../lib/model';
import { failure } from '../support/failures';
import { modelConfig, randomModel, removeModels } from '../support/model';
import { backendOf, disposeBackends } from '../support/native';
import { Random } from '../support/random';

afterAll(() => {
  disposeBackends();
  removeModels();
});

jest.setTimeout(60_000);
const random = new Random(70);
const ids = (count: number) => Int32Array.from({ length: count }, () => random.below(40));
const opened = (changes: Partial<ModelConfig> = {}) =>
  Model.openSync(backendOf('', 2), randomModel(modelConfig(changes)));
const contender = (scheme: DescribedScheme, name = scheme.name): Contender => ({ name, scheme });
const rotated = schemes.rotated({ keyBits: 2, valueBits: 2 });
const small = { windows: { sink: 4, recent: 8 } };
const mean = (values: readonly number[]) => values.reduce((a, b) => a + b, 0) / values.length;

describe('two distributions', () => {
  const logits = () => Float32Array.from({ length: 300 }, () => 4 * random.gaussian());

  test('loss, divergence, agreement and shift are those of their definitions', () => {
    const exact = (row: Float32Array) => {
      const sum = row.reduce((a, x) => a + Math.exp(x), 0);
      return Array.from(row, (x) => Math.exp(x) / sum);
    };
    for (let round = 0; round < 20; round++) {
      const [a, b] = [logits(), logits()];
      const [p, q] = [exact(a), exact(b)];
      const { nll, kld, sameTop, shift } = compare(distributionOf(a), b, 17);
      // Probabilities are float32 in between: each is off by 2^-24 of itself.
      const terms = p.map((x, i) => x * Math.log(x / q[i]!));
      const slack = 2 ** -24 * terms.reduce((sum, term) => sum + Math.abs(term), 0) + 1e-12;
      expect(Math.abs(kld - terms.reduce((x, y) => x + y, 0))).toBeLessThanOrEqual(slack);
      expect(nll).toBeCloseTo(-Math.log(q[17]!), 10);
      expect(shift).toBeCloseTo(q[17]! - p[17]!, 10);
      expect(sameTop).toBe(a.indexOf(Math.max(...a)) === b.indexOf(Math.max(...b)));
    }
  });

  test('a distribution does not diverge from itself, at any size of logits', () => {
    for (const factor of [1, 1e4]) {
      const row = logits().map((x) => factor * x);
      expect(compare(distributionOf(row), row.slice(), 3)).toMatchObject({ kld: 0, sameTop: true, shift: 0 });
    }
  });
});

describe('protocols', () => {
  test('window, stride, BOS and what is scored', () => {
    expect(planOf('P1', { bos: 1 })).toMatchObject({
      window: 2048,
      stride: 2048,
      bos: 'text',
      firstScored: 1,
    });
    expect(planOf('P2', { bos: 1 })).toMatchObject({
      window: 512,
      stride: 512,
      bos: 'window',
      firstScored: 257,
    });
    expect(planOf('P3')).toMatchObject({ window: 2048, stride: 2048, bos: 'none', firstScored: 1024 });
    expect(planOf('P4')).toMatchObject({ window: 8192, stride: 4096, bos: 'none', firstScored: 4096 });
    expect(['P1', 'P2', 'P3', 'P4'].map((name) => planOf(name as 'P1').decoded)).toEqual([
      false,
      false,
      true,
      true,
    ]);
    expect(() => planOf('P5' as 'P1')).toThrow(failure('ERR_INNERKV_INVALID_ARGUMENT', 'P1, P2, P3, P4'));
  });

  test('windows of a text', () => {
    const text = Int32Array.from({ length: 20 }, (_, i) => i + 10);
    const cut = (name: 'P1' | 'P2' | 'P4', most?: number) =>
      windowsOf(planOf(name, { window: 8, bos: 1 }), text, 1, most).map((window) => [
        ...window.subarray(0, 2),
      ]);
    expect(cut('P1')).toEqual([[10, 11], [18, 19]]); // prettier-ignore
    expect(cut('P2')).toEqual([[1, 11], [1, 19]]); // prettier-ignore
    expect(cut('P4')).toEqual([[10, 11], [14, 15], [18, 19], [22, 23]]); // prettier-ignore
    expect(cut('P4', 2)).toHaveLength(2);
    expect(text[0]).toBe(10);
    for (const name of ['P1', 'P4'] as const) {
      const plan = planOf(name, { window: 8 });
      const enough = text.subarray(0, tokensFor(plan, 2));
      expect(windowsOf(plan, enough, undefined)).toHaveLength(2);
      expect(windowsOf(plan, enough.subarray(1), undefined)).toHaveLength(1);
    }
  });
});

describe('perplexity of a model', () => {
  const text = ids(260);
  const plan = (name: 'P1' | 'P2' | 'P3' | 'P4', window = 128) => planOf(name, { window });
  const measured = async (options: PerplexityOptions, config?: Partial<ModelConfig>) => {
    using model = opened(config);
    return await perplexity(model, text, { ...small, ...options });
  };

  test.each(['P1', 'P2', 'P3', 'P4'] as const)('%s: the loss is that of the model', async (name) => {
    const { schemes: rows, ...rest } = await measured({
      plan: plan(name),
      contenders: [contender(schemes.fp16(), 'the same')],
    });
    using model = opened();
    using cache = await model.createCache({ scheme: schemes.fp16(), memory: '64MiB' });
    const { firstScored } = plan(name);
    const windows = windowsOf(plan(name), text, undefined);
    const losses = windows.flatMap((window) => [
      ...model.nllSync(cache.sequence(), window, { activations: 'float32' }).subarray(firstScored - 1, 127),
    ]);
    expect(rest).toMatchObject({ windows: windows.length, tokensScored: losses.length });
    expect(losses.length).toBe(windows.length * { P1: 127, P2: 63, P3: 64, P4: 64 }[name]);
    expect(rows.map(({ scheme }) => scheme)).toEqual(['fp16', 'the same']);
    for (const row of rows) {
      // Losses of nll() are float32.
      expect(Math.abs(row.nll - mean(losses))).toBeLessThan(8 * 2 ** -24 * 4);
      expect(row.perplexity).toBe(Math.exp(row.nll));
      expect(row).toMatchObject({ meanKld: 0, kld99: 0, topAgreement: 1, rmsShift: 0, perplexityChange: 0 });
    }
  });

  test('P3 decodes: as token by token, in chunks of any size; P1 appends a chunk at once', async () => {
    const decoded = await Promise.all(
      [1, 7, 128].map((chunk) =>
        measured({ plan: plan('P3'), contenders: [contender(rotated)], chunk, chunks: 1 }),
      ),
    );
    const facts = decoded.map((report) =>
      report.schemes.map(({ tokensPerSecond, ...row }) => ({ ...row, timed: tokensPerSecond > 0 })),
    );
    expect(facts[1]).toEqual(facts[0]);
    expect(facts[2]).toEqual(facts[0]);
    expect(facts[0]![1]!.meanKld).toBeGreaterThan(0);

    const prefilled = (chunk: number) =>
      measured({ plan: plan('P1'), contenders: [contender(rotated)], chunk, chunks: 1 });
    const [whole, single] = [await prefilled(128), await prefilled(1)];
    expect(whole.schemes[1]!.meanKld).not.toBe(single.schemes[1]!.meanKld);
    // Over 16-bit rows only the order of the attention's float32 sums differs.
    expect(whole.schemes[0]!.nll).toBeCloseTo(single.schemes[0]!.nll, 5);
  });

  test('size, bits, layers and windows of their own', async () => {
    const q4 = schemes.q4_0();
    const contenders: Contender[] = [
      contender(q4),
      { name: 'without windows', scheme: q4, windows: { sink: 0, recent: 0 } },
    ];
    const plain = await measured({ plan: plan('P3'), contenders });
    const [fp16, packed, bare] = plain.schemes;
    expect(fp16!.bitsPerValue).toBe(16);
    expect(packed!.bitsPerValue).toBeCloseTo(q4.bitsPerValue(64), 10);
    expect(packed!.cacheBytes).toBeGreaterThan(bare!.cacheBytes);
    expect(bare!.meanKld).toBeGreaterThan(packed!.meanKld);
    expect(packed!.bitsPerValueInAll).toBeGreaterThan(packed!.bitsPerValue);

    const layers = new Map([[0, schemes.fp16()], [1, schemes.fp16()]]); // prettier-ignore
    const kept = await measured({ plan: plan('P3'), contenders, layers });
    expect(kept.schemes.map(({ bitsPerValue }) => bitsPerValue)).toEqual([16, 16, 16]);
    // Other windows split the float32 sums of the attention elsewhere.
    expect(Math.max(...kept.schemes.map(({ meanKld }) => meanKld))).toBeLessThan(1e-9);
    const half = await measured({ plan: plan('P3'), contenders, layers: new Map([[1, schemes.fp16()]]) });
    expect(half.schemes[1]!.bitsPerValue).toBeCloseTo((16 + q4.bitsPerValue(64)) / 2, 10);
    expect(half.schemes[1]!.meanKld).toBeGreaterThan(0);
  });

  test('an exception for a layer changes that layer and no other', async () => {
    const [q4, q8, all] = [schemes.q4_0(), schemes.q8(), rotated];
    const own = { name: 'own', layers: new Map([[2, q8]]) };
    const of = layerSchemes(own, q4, new Map([[0, all], [2, all]])); // prettier-ignore
    expect([0, 1, 2, 3].map((layer) => of(layer).name)).toEqual([all.name, 'q4_0', 'q8', 'q4_0']);
    expect(layerSchemes({ ...own, name: 'fp16' }, q4, new Map([[0, all]]))(2)).toBe(q4);

    // The same keys and values in every layer: what a layer holds then depends on its scheme alone.
    using model = opened({ layers: 4 });
    const windows = { sink: 2, recent: 6 };
    const rows = Float32Array.from({ length: 200 * 2 * 64 }, () => random.gaussian());
    const held = (
      scheme: PerplexityOptions['contenders'][number]['scheme'] | ((layer: number) => typeof q4),
    ) => {
      using cache = model.createCacheSync({ scheme: scheme as typeof q4, windows, memory: '64MiB' });
      const sequence = cache.sequence();
      return [0, 1, 2, 3].map((layer) => {
        sequence.appendSync(layer, rows, rows);
        const { scheme: _, ...plan } = cache.plan()[layer]!;
        const pages = [0, 1].map((head) => sequence.pageBytes(layer, head, 0));
        return { plan: { ...plan, layer: 0 }, pages };
      });
    };
    const [mixed, uniform] = [held(of), { q4: held(q4)[0], q8: held(q8)[0], all: held(all)[0] }];
    expect(mixed).toEqual([uniform.all, uniform.q4, uniform.q8, uniform.q4]);
    expect(mixed[2]).not.toEqual(mixed[1]);

    const name = '1 in 8 bits';
    const report = await perplexity(model, text, {
      ...small,
      plan: plan('P3'),
      contenders: [contender(q4), { name, scheme: q4, layers: new Map([[1, q8]]) }],
    });
    const [, plain, excepted] = report.schemes;
    expect(excepted!.bitsPerValue - plain!.bitsPerValue).toBeCloseTo((q8.bitsPerValue(64) - 4.5) / 4, 10);
    expect(excepted!.meanKld).not.toBe(plain!.meanKld);
  });

  test('what is known is not measured again, and puts the same rows together', async () => {
    using model = opened();
    const run = (options: Partial<PerplexityOptions>) =>
      perplexity(model, text, {
        ...small,
        plan: plan('P3', 64),
        contenders: [contender(schemes.q4_0()), contender(rotated)],
        ...options,
      });
    const untimed = ({ schemes: rows, records: _, ...rest }: Awaited<ReturnType<typeof run>>) => ({
      ...rest,
      rows: rows.map(({ tokensPerSecond, ...row }) => ({ ...row, timed: tokensPerSecond > 0 })),
    });
    const whole = await run({});
    const measured: string[] = [];
    const watch = { onProgress: (_: number, name: string) => name && measured.push(name) };
    const stored = (report: typeof whole) =>
      JSON.parse(JSON.stringify(report.records)) as typeof report.records;
    expect(await run({ known: stored(whole), ...watch })).toEqual(whole);
    expect(measured).toEqual([]);

    // One scheme of one window, as after an interrupted run; records of other schemes are handed on.
    const part = await run({ chunks: 1, contenders: [contender(rotated), contender(schemes.q8())] });
    const resumed = await run({ known: stored(part), ...watch });
    expect(untimed(resumed)).toEqual(untimed(whole));
    expect(new Set(measured)).toEqual(new Set(['fp16', 'q4_0', rotated.name]));
    expect(measured.filter((name) => name === rotated.name).length).toBeLessThan(
      measured.filter((name) => name === 'q4_0').length,
    );
    expect(resumed.records.map(({ scheme }) => scheme)).toContain('q8');
  });

  test('bits per byte, losses by position, reports and progress on the way', async () => {
    const reports: number[] = [];
    const fractions: number[] = [];
    const report = await measured({
      plan: plan('P4', 64),
      contenders: [contender(rotated)],
      byteLength: () => 3,
      onWindow: ({ windows }) => reports.push(windows),
      onProgress: (fraction) => fractions.push(fraction),
    });
    const row = report.schemes[1]!;
    expect(row.bitsPerByte).toBeCloseTo(row.nll / Math.LN2 / 3, 10);
    expect(row.buckets.map(({ from, to }) => [from, to])).toEqual([[32, 40], [40, 48], [48, 56], [56, 64]]); // prettier-ignore
    expect(mean(row.buckets.map(({ nll }) => nll))).toBeCloseTo(row.nll, 10);
    expect(mean(row.buckets.map(({ kld }) => kld))).toBeCloseTo(row.meanKld, 10);
    expect(reports).toEqual(Array.from({ length: report.windows - 1 }, (_, i) => i + 1));
    expect(fractions).toEqual(fractions.toSorted((a, b) => a - b));
    expect(fractions.at(-1)).toBe(1);
  });

  test('calibrated on the prompt: moments of each window', async () => {
    const seen: number[][] = [];
    using model = opened();
    const report = await perplexity(model, text, {
      ...small,
      plan: plan('P3'),
      contenders: [
        {
          name: 'prompt',
          scheme: async (window, options) => {
            seen.push([...window]);
            return calibratedFromPrompt(model, window, { keyBits: 4, valueBits: 4, tokens: 48, ...options });
          },
        },
      ],
    });
    expect(seen).toEqual(windowsOf(plan('P3'), text, undefined).map((window) => [...window]));
    const { meanKld, bitsPerValue } = report.schemes[1]!;
    expect(bitsPerValue).toBe(4.25);
    expect(meanKld).toBeGreaterThan(0);
    expect(meanKld).toBeLessThan(0.05);
  });

  test('bad input and an abort', async () => {
    const bad = (message: string) => failure('ERR_INNERKV_INVALID_ARGUMENT', message);
    const contenders = [contender(rotated)];
    await expect(measured({ plan: plan('P3', 512), contenders }, { contextLength: 256 })).rejects.toThrow(
      bad('256'),
    );
    await expect(measured({ plan: plan('P3', 261), contenders })).rejects.toThrow(
      bad('not one window of 261'),
    );
    await expect(measured({ plan: plan('P3'), contenders, chunk: 0 })).rejects.toThrow(bad('chunk'));
    const layers = new Map([[2, schemes.q8()]]);
    await expect(measured({ plan: plan('P3'), contenders, layers })).rejects.toThrow(bad('no layer 2'));
    const own = [{ ...contender(rotated), layers }];
    await expect(measured({ plan: plan('P3'), contenders: own })).rejects.toThrow(bad('no layer 2'));
    const controller = new AbortController();
    const aborted = measured({
      plan: plan('P3'),
      contenders,
      chunk: 16,
      signal: controller.signal,
      onProgress: (fraction) => fraction > 0.2 && controller.abort(new Error('enough')),
    });
    await expect(aborted).rejects.toThrow('enough');
  });
});
