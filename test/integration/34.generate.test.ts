/** `innerkv generate` as a user runs it: on a small random model written here, and on real ones. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { schemes } from '../../lib';
import { parseOptions, UsageError } from '../../lib/cli/command';
import { generate as command } from '../../lib/cli/generate';
import { interruptible } from '../../lib/cli/interrupt';
import { Model, openModel, type GenerateOptions, type Prompt } from '../../lib/model';
import { innerkv } from '../support/command';
import { dataPath, describeWithData } from '../support/data';
import { failure } from '../support/failures';
import { runnableGguf } from '../support/gguf';
import { backendOf, disposeBackends } from '../support/native';

const folder = mkdtempSync(join(tmpdir(), 'innerkv-'));
const path = join(folder, 'tiny.gguf');

beforeAll(() => writeFileSync(path, runnableGguf()));
afterAll(() => {
  disposeBackends();
  rmSync(folder, { recursive: true });
});

const args = (...rest: string[]) => [
  'generate',
  '--model',
  path,
  '--threads',
  '1',
  '--prompt',
  'hello',
  ...rest,
];

interface Report {
  text: string;
  ids: number[];
  reason: string;
  seed: number;
  texts: { text: string; ids: number[] }[];
}

const run = (...given: string[]) => command.run(parseOptions(command, given));

async function text(model: Model, prompt: Prompt, options: GenerateOptions) {
  return model.generate(prompt, { maxTokens: 40, ...options }).finish();
}

describe('the command', () => {
  test('--json: one object, the same for equal seeds, and what the API gives', async () => {
    const options = ['--json', '--scheme', 'rotated-k3v3', '--windows', '4+8', '--temperature', '1.5', '--top-k', '50',
      '--top-p', '.95', '--min-p', '0.001', '--repeat-penalty', '1.1', '--seed', '9', '--max-tokens', '30', '--stop', 'zz,z', '--stop', '\u20ac']; // prettier-ignore
    const { status, stdout, stderr } = innerkv(args(...options));
    expect([status, stderr]).toEqual([0, '']);
    const report = JSON.parse(stdout) as Report;
    expect(report).toMatchObject({
      model: { name: 'tiny', file: 'tiny.gguf' },
      ...{ scheme: 'rotated-k3v3', windows: '4+8', reason: 'maxTokens', promptTokens: 1, seed: 9 },
      prefill: { tokens: 1, seconds: expect.any(Number), tokensPerSecond: expect.any(Number) },
      decode: { tokens: 29 },
      ...{ bitsPerValue: 3.25, cacheBytes: expect.any(Number), bitsPerValueInAll: expect.any(Number) },
    });
    expect(report.ids).toHaveLength(30);
    using model = Model.openSync(backendOf(), path);
    const expected = await text(model, 'hello', {
      scheme: schemes.rotated({ keyBits: 3, valueBits: 3 }),
      windows: { sink: 4, recent: 8 },
      ...{ temperature: 1.5, topK: 50, topP: 0.95, minP: 0.001, repeatPenalty: 1.1, seed: 9, maxTokens: 30 },
    });
    expect([report.text, report.ids]).toEqual([expected.text, expected.ids]);
  }, 60_000);

  test('a prompt from stdin, streamed into a pipe', async () => {
    const { status, stdout, stderr } = spawnSync(
      process.execPath,
      [join('bin', 'innerkv.js'), 'generate', '--model', path, '--prompt', '-', '--stream', '--max-tokens', '9'],
      { cwd: join(__dirname, '..', '..'), env: { ...process.env, INNERKV_SOURCE: '1' }, input: 'hello', encoding: 'utf8' },
    ); // prettier-ignore
    expect(status).toBe(0);
    expect(stderr).toMatch(
      /^prompt 1 tokens at [\d.]+\/s; decoded 8 tokens.*; cache .*B, 4\.25 bits per value, /,
    );
    using model = Model.openSync(backendOf(), path);
    await expect(text(model, 'hello', { maxTokens: 9 })).resolves.toMatchObject({
      text: stdout.slice(0, -1),
    });
  }, 60_000);

  test('several prompts: texts under their numbers when they are done', async () => {
    const printed = jest.spyOn(console, 'log').mockImplementation(() => undefined);
    const cost = jest.spyOn(console, 'error').mockImplementation(() => undefined);
    const options = [
      '--prompt',
      ' world',
      '--chat',
      '--system',
      'x',
      '--scheme',
      'fp16',
      '--max-tokens',
      '8',
    ];
    try {
      expect(await run(...args(...options).slice(1))).toBe(0);
      expect(printed.mock.calls.flat()).toEqual(['=== 1', expect.anything(), '\n=== 2', expect.anything()]);
      expect(cost.mock.calls.flat()).toEqual([expect.stringContaining('decoded 14 tokens')]);
    } finally {
      printed.mockRestore();
      cost.mockRestore();
    }
  });

  test('Ctrl-C is an abort', () => {
    using interrupt = interruptible();
    expect(interrupt.signal.aborted).toBe(false);
    process.emit('SIGINT');
    expect(interrupt.signal.reason).toEqual(failure('ERR_INNERKV_ABORTED'));
  });

  test('a prompt without tokens, a file that is no model', async () => {
    await expect(run('--model', path, '--prompt', '')).rejects.toThrow(
      failure('ERR_INNERKV_INVALID_ARGUMENT', 'at least one token'),
    );
    await expect(run('--model', `${path}.absent`, '--prompt', 'x')).rejects.toThrow(
      failure('ERR_INNERKV_INVALID_ARGUMENT'),
    );
  });

  test.each<[string, string[]]>([
    ['--model is missing', ['--prompt', 'x']],
    ['--prompt is missing', ['--model', 'MODEL']],
    ['needs --calibration', ['--model', 'MODEL', '--prompt', 'x', '--scheme', 'calibrated-k3v3']],
    ['There is no scheme', ['--model', 'MODEL', '--prompt', 'x', '--scheme', 'nothing']],
    ['--windows must be like 32+96', ['--model', 'MODEL', '--prompt', 'x', '--windows', '32']],
    ['--system needs --chat', ['--model', 'MODEL', '--prompt', 'x', '--system', 'y']],
    ['--top-p must be', ['--model', 'MODEL', '--prompt', 'x', '--top-p', '2']],
    ['--seed must be', ['--model', 'MODEL', '--prompt', 'x', '--seed', '0x10']],
    ['--max-tokens must be', ['--model', 'MODEL', '--prompt', 'x', '--max-tokens', '0']],
    ['--activations must be', ['--model', 'MODEL', '--prompt', 'x', '--activations', 'fp4']],
    ['once', ['--model', 'MODEL', '--prompt', '-', '--prompt', '-']],
  ])('usage: %s', async (message, given) => {
    const error: unknown = await Promise.resolve(run(...given.map((one) => one.replace('MODEL', path)))).catch((e: unknown) => e); // prettier-ignore
    expect(error).toBeInstanceOf(UsageError);
    expect((error as Error).message).toContain(message);
  });
});

const stories = 'models/stories260K/stories260K.bin';
describeWithData('stories260K', [stories], () => {
  test('greedy text is the recorded one, from a prompt too', async () => {
    using model = Model.openSync(backendOf(), dataPath(stories));
    const recorded =
      'Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw ' +
      'a big, red ball. She wanted to play with it, but it was too high.\nLily\'s mom said, "Lily, let\'s go to the park."';
    const options = { scheme: schemes.fp16(), maxTokens: 100 };
    const free = await text(model, '', options);
    expect(free.text.slice(0, recorded.length)).toBe(recorded);
    const begun = await text(model, 'Once upon a time', options);
    expect(`Once upon a time${begun.text}`.slice(0, recorded.length)).toBe(recorded);
    const stopped = await text(model, '', { ...options, stop: ['. One day', 'never'] });
    expect(stopped.text).toBe(recorded.slice(0, recorded.indexOf('. One day')));
  });
});

const smollm2 = 'models/smollm2-135m/smollm2-135m-instruct.q4_1.gguf';
const moments = 'activations/smollm2_moments_wiki2048.safetensors';
describeWithData('SmolLM2-135M', [smollm2, moments], () => {
  const file = openModel(dataPath(smollm2));
  // No windows: every key and value is read from its few bits as soon as 128 tokens give the statistics.
  const bare = { windows: { sink: 0, recent: 0 } };
  const story = `Here is a story.\n${'The old man walked down to the sea every morning to look at the boats. '.repeat(12)}`;

  test('a conversation: an answer that ends by itself, alone and in a batch, streamed and at once', async () => {
    using model = Model.openSync(backendOf('', 2), file);
    const ask = (content: string): Prompt => [{ role: 'user', content }];
    const options = { scheme: schemes.fp16(), activations: 'float32', maxTokens: 40 } as const;
    const alone = await text(model, ask('What is the capital of France?'), options);
    expect(alone).toMatchObject({ text: 'The capital of France is Paris.', reason: 'eos' });
    const generation = model.generateBatch([ask('Hi'), ask('What is the capital of France?')], options);
    let streamed = '';
    for await (const { index, text: part } of generation) if (index === 1) streamed += part;
    const { texts } = await generation.finish();
    expect([streamed, texts[1]?.text, texts[1]?.ids]).toEqual([alone.text, alone.text, alone.ids]);
    expect(texts[0]?.text).toMatch(/^Hello!/);
  }, 120_000);

  test('packed caches: rotated K4V4 begins as 16 bits do, 3 bits write words, equal seeds equal texts', async () => {
    using model = Model.openSync(backendOf('', 2), file);
    const exact = await text(model, story, { scheme: schemes.fp16(), maxTokens: 8 });
    const four = { ...bare, scheme: schemes.rotated({ keyBits: 4, valueBits: 4 }), maxTokens: 8 };
    const packed = await text(model, story, four);
    expect(packed.promptTokens).toBeGreaterThan(180);
    expect(packed.ids.slice(0, 4)).toEqual(exact.ids.slice(0, 4));

    for (const scheme of [
      schemes.rotated({ keyBits: 3, valueBits: 3 }),
      schemes.calibrated(dataPath(moments), { keyBits: 3, valueBits: 3 }),
    ]) {
      const options = { ...bare, scheme, temperature: 0.7, topP: 0.9, seed: 1, maxTokens: 24 };
      const three = await text(model, story, options);
      expect(three.text).toMatch(/^[\x20-\x7e\n\u2018-\u201d]+$/);
      expect(three.text.match(/\b(the|a|to|and|was|of|he|his|in|it)\b/gi)?.length).toBeGreaterThan(2);
      expect(three.bitsPerValue).toBe(3.25);
      if (scheme.name.startsWith('rotated'))
        expect((await text(model, story, options)).ids).toEqual(three.ids);
    }
  }, 120_000);
});
