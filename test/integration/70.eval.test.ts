import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { setTimeout } from 'node:timers/promises';
import { schemes } from '../../lib';
import { parseOptions } from '../../lib/cli/command';
import { perplexity as commandLine } from '../../lib/cli/perplexity';
import { type SweepReport } from '../../lib/cli/sweep';
import { leadingTokens, perplexity, planOf } from '../../lib/eval';
import { Model, openModel } from '../../lib/model';
import { decodeFloats, readSafetensors } from '../../lib/schemes/safetensors';
import { parseMoments } from '../../lib/schemes/moments';
import { innerkv } from '../support/command';
import { dataPath, describeWithData } from '../support/data';
import { removeModels, temporaryFile } from '../support/model';
import { backendOf, disposeBackends } from '../support/native';

const files = {
  model: 'models/smollm2-135m/smollm2-135m-instruct.q4_1.gguf',
  moments: 'activations/smollm2_moments_wiki2048.safetensors',
  calibration: 'texts/calibration/wiki.utf8',
  text: 'texts/wikitext-2-raw/wikitext2-test-joined.txt',
  golden: 'golden/smollm2_wikitext2.safetensors',
};

afterAll(() => {
  disposeBackends();
  removeModels();
});

describeWithData('calibrate and perplexity of SmolLM2-135M', Object.values(files), () => {
  const path = temporaryFile('smollm2.calib.safetensors');
  const model = dataPath(files.model);

  test('innerkv calibrate reproduces the recorded moments', () => {
    const args = ['calibrate', '--model', model, '--text', dataPath(files.calibration), '-o', path, '--json'];
    const { status, stdout, stderr } = innerkv(args);
    expect([status, stderr]).toEqual([0, '']);
    expect(JSON.parse(stdout)).toMatchObject({
      tokens: 2044,
      layers: 30,
      kvHeads: 3,
      headDim: 64,
      output: path,
    });
    const ours = parseMoments(readSafetensors(path));
    const theirs = parseMoments(readSafetensors(dataPath(files.moments)));
    const error = (actual: ArrayLike<number>, expected: ArrayLike<number>) => {
      let [difference, size] = [0, 0];
      for (let i = 0; i < expected.length; i++) {
        difference += (actual[i]! - expected[i]!) ** 2;
        size += expected[i]! ** 2;
      }
      return Math.sqrt(difference / size);
    };
    for (const [layer, heads] of theirs.layers)
      heads.forEach((head, h) => {
        // Keys and queries are observed in float32. Those of layer 0 have met no cache: what differs is the order of sums of 576
        // products, whose roundings grow like their root. In later layers keys and values of earlier ones were
        // binary16, each off by at most 2^-11 of itself where the record has float32; means over 2,044 tokens stay below one.
        const bound = layer === 0 ? Math.sqrt(576) * 2 ** -24 : 2 ** -11;
        for (const part of ['keyMean', 'keyMoment', 'queryMoment'] as const)
          expect(error(ours.layers.get(layer)![h]![part], head[part])).toBeLessThan(bound);
      });
  }, 300_000);

  test('perplexity: the golden losses over fp16, divergences in their order', async () => {
    const file = openModel(model);
    using opened = await Model.open(backendOf('', 2), file);
    const plan = planOf('P3', { window: 256 });
    const ids = leadingTokens(file.tokenizer, readFileSync(dataPath(files.text), 'utf8'), 256);
    const contenders = [
      schemes.calibrated(path, { keyBits: 4, valueBits: 4 }),
      schemes.calibrated(path, { keyBits: 2, valueBits: 2 }),
    ].map((scheme) => ({ name: scheme.name, scheme }));
    const report = await perplexity(opened, ids, { plan, contenders });
    const golden = decodeFloats(readSafetensors(dataPath(files.golden)).tensors.get('nll')!)!.subarray(
      127,
      255,
    );
    const [fp16, four, two] = report.schemes;
    expect(report.tokensScored).toBe(128);
    expect(Math.abs(fp16!.nll - [...golden].reduce((a, b) => a + b, 0) / 128)).toBeLessThan(0.003);
    expect(four!.meanKld).toBeGreaterThan(0);
    expect(four!.meanKld).toBeLessThan(two!.meanKld / 4);
    expect(two!.meanKld).toBeLessThan(0.05);
    expect(two!.cacheBytes).toBeLessThan(four!.cacheBytes);
  }, 300_000);
});

const story = {
  model: 'models/stories260K/stories260K.bin',
  text: 'texts/tinystories/tinystories_dev.jsonl',
};

describeWithData('the command line on stories260K', Object.values(story), () => {
  const common = ['--model', dataPath(story.model), '--text', dataPath(story.text)];
  const short = ['perplexity', ...common, '--tokens', '64', '--chunks', '2'];

  test('innerkv perplexity --json', () => {
    const out = temporaryFile('report.json');
    const args = [
      ...short,
      '--scheme',
      'q8',
      '--scheme',
      'q4_0@0+0,rotated-k4v4',
      '--layers',
      '0=fp16',
      '--json',
    ];
    const { status, stdout, stderr } = innerkv([...args, '--windows', '4+8', '--out', out]);
    expect([status, stderr]).toEqual([0, '']);
    const report = JSON.parse(stdout) as {
      schemes: { scheme: string; bitsPerByte: number; meanKld: number }[];
    };
    expect(report).toMatchObject({
      text: { file: 'tinystories_dev.jsonl' },
      protocol: { protocol: 'P3', window: 64, stride: 64, bos: 'text', decoded: true },
      ...{ windows: 2, tokensScored: 64, layers: { 0: 'fp16' }, cacheWindows: { sink: 4, recent: 8 } },
    });
    expect(report.schemes.map(({ scheme }) => scheme)).toEqual(['fp16', 'q8', 'q4_0@0+0', 'rotated-k4v4']);
    expect(report.schemes.every(({ bitsPerByte }) => bitsPerByte > 0.2 && bitsPerByte < 8)).toBe(true);
    expect(report.schemes[1]!.meanKld).toBeLessThan(report.schemes[2]!.meanKld);
    expect(JSON.parse(readFileSync(out, 'utf8'))).toMatchObject({ windows: 2 });
  }, 60_000);

  test('innerkv perplexity for people, long windows by position', () => {
    const { status, stdout } = innerkv([...short, '--scheme', 'q8', '--protocol', 'P4']);
    expect(status).toBe(0);
    for (const text of ['window 64, stride 32', '64 tokens scored', '99 % KLD', 'q8', '32…39', 'top-1'])
      expect(stdout).toContain(text);
  }, 60_000);

  test('innerkv sweep: a grid, its front, the plot; it goes on where it was', () => {
    const [out, svg] = [temporaryFile('sweep.json'), temporaryFile('sweep.svg')];
    const args = ['sweep', ...common, '--tokens', '64', '--windows', '4+8', '--out', out, '--json'];
    const run = (...more: string[]) => {
      const { status, stdout, stderr } = innerkv([...args, ...more]);
      expect([status, stderr]).toEqual([0, '']);
      return JSON.parse(stdout) as SweepReport;
    };
    const stored = () =>
      JSON.parse(readFileSync(out, 'utf8')) as SweepReport & { records: { scheme: string }[] };
    const grid = ['--scheme', 'rotated-k{2,3}v2', '--scheme', 'q4_0@{0+0,4+8}'];
    run(...grid, '--chunks', '1');
    const first = stored();
    expect(first.records).toHaveLength(5);
    // Another scheme and another window: the first window of the others is not measured again.
    const report = run(...grid, '--chunks', '2', '--scheme', 'q8', '--svg', svg);
    const names = ['rotated-k2v2', 'rotated-k3v2', 'q4_0@0+0', 'q4_0@4+8', 'q8'];
    expect(new Set(report.schemes.map(({ scheme }) => scheme))).toEqual(new Set(['fp16', ...names]));
    expect(stored().records).toHaveLength(12);
    expect(stored().records).toEqual(expect.arrayContaining(first.records));
    const again = run(...grid, '--chunks', '2', '--scheme', 'q8');
    expect(again.schemes).toEqual(report.schemes);

    const sizes = report.schemes.map((row) => row.bitsPerValueInAll);
    expect(sizes).toEqual(sizes.toSorted((a, b) => a - b));
    for (const row of report.schemes) {
      const beaten = report.schemes.some(
        (other) => other.bitsPerValueInAll < row.bitsPerValueInAll && other.meanKld < row.meanKld,
      );
      expect(row.front).toBe(!beaten && row.scheme !== 'fp16');
    }
    const drawn = readFileSync(svg, 'utf8');
    for (const text of ['<svg', 'Pareto front', 'rotated-k2v2', 'mean KLD', 'stories'])
      expect(drawn).toContain(text);

    const refused = (...more: string[]) => innerkv([...args, '--scheme', 'q8', ...more]);
    const other = refused('--protocol', 'P4');
    expect([other.status, other.stderr]).toEqual([
      1,
      expect.stringContaining('another model, text, protocol'),
    ]);
    writeFileSync(out, '{');
    expect(refused()).toMatchObject({ status: 1, stderr: expect.stringContaining('is no sweep') });
    expect(readFileSync(out, 'utf8')).toBe('{');
  }, 120_000);

  test('innerkv sweep ends on Ctrl-C, and what it had measured is there', async () => {
    const out = temporaryFile('sweep.json');
    const args = ['bin/innerkv.js', 'sweep', ...common, '--tokens', '64', '--scheme', 'q8', '--out', out];
    const child = spawn(process.execPath, args, { env: { ...process.env, INNERKV_SOURCE: '1' } });
    let errors = '';
    child.stderr.on('data', (text: Buffer) => (errors += text.toString()));
    const ended = once(child, 'exit');
    while (child.exitCode === null && !existsSync(out)) await setTimeout(20);
    child.kill('SIGINT');
    expect(await ended).toEqual([1, null]);
    expect(errors).toContain('Interrupted');
    const { windows, records } = JSON.parse(readFileSync(out, 'utf8')) as {
      windows: number;
      records: object[];
    };
    expect(records).toHaveLength(2 * windows);
    const { status, stdout } = innerkv([...args.slice(1), '--chunks', String(windows), '--json']);
    expect([status, (JSON.parse(stdout) as SweepReport).windows]).toEqual([0, windows]);
  }, 120_000);

  test('innerkv sweep for people', () => {
    const args = ['sweep', ...common, '--tokens', '64', '--chunks', '1', '--scheme', 'q8,q4_0,q4_0[0=q8]'];
    const { status, stdout } = innerkv(args);
    expect(status).toBe(0);
    for (const text of ['window 64', '* ', 'q4_0[0=q8]', 'in all']) expect(stdout).toContain(text);
  }, 60_000);

  test.each([
    ['no scheme', [], 'UsageError', '--scheme is missing'],
    ['an unknown scheme', ['--scheme', 'q5'], 'UsageError', 'no scheme "q5"'],
    ['no calibration', ['--scheme', 'calibrated-k2v2'], 'UsageError', '--calibration FILE'],
    ['an unknown protocol', ['--scheme', 'q8', '--protocol', 'P9'], 'UsageError', 'P1, P2, P3, P4'],
    ['wrong windows', ['--scheme', 'q8', '--windows', '32'], 'UsageError', 'like 32+96'],
    ['wrong layers', ['--scheme', 'q8', '--layers', 'q8'], 'UsageError', 'like 0=q8'],
    [
      'a file that is no calibration',
      ['--scheme', 'q8', '--calibration', dataPath(story.model)],
      'KvError',
      'valid safetensors',
    ],
  ] as const)('%s is refused', async (_, args, kind, message) => {
    const run = async () => commandLine.run(parseOptions(commandLine, [...short.slice(1), ...args]));
    await expect(run()).rejects.toThrow(
      expect.objectContaining({ name: kind, message: expect.stringContaining(message) }) as Error,
    );
  });
});
