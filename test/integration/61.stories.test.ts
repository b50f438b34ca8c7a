import { readFileSync } from 'node:fs';
import { schemes } from '../../lib';
import { Model, openModel } from '../../lib/model';
import { dataPath, describeWithData } from '../support/data';
import { backendOf, disposeBackends } from '../support/native';

// Tiny models, stored in float32 and in ternary codes: recorded texts and losses. INNERKV_STORIES=200 scores as many stories as
// were recorded instead of a few.

afterAll(disposeBackends);

const vocabulary = 'models/stories260K/tok512.bin';
const stories = 'texts/tinystories/tinystories_dev.jsonl';
const FEW = 12;
const RECORDED = 200;

interface Golden {
  readonly path: string;
  /** What greedily follows a prompt, where it was recorded. */
  readonly greedy?: readonly [prompt: string, text: string];
  /** Nats per token of the first FEW stories, from an independent program in float64, and of the first RECORDED ones. */
  readonly few: number;
  readonly all: number;
}

const lily = 'there was a little girl named Lily. She loved to play outside';
const goldens: readonly Golden[] = [
  {
    path: 'models/stories260K/stories260K.bin',
    greedy: [
      '',
      `Once upon a time, ${lily} in the park. One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n` +
        'Lily\'s mom said, "Lily, let\'s go to the park."',
    ],
    few: 1.392639,
    all: 1.5356,
  },
  {
    path: 'models/bitllama/bitllama-3M.bin',
    greedy: [
      'Once upon a time',
      `, ${lily} and explore the world around her. One day, she saw a big, red ball. She was so happy and wanted to play with it.`,
    ],
    few: 1.250257,
    all: 1.4605,
  },
  { path: 'models/bitllama/bitllama-1M.bin', few: 1.439369, all: 1.6105 },
];

describe.each(goldens)('$path', ({ path, greedy, few, all }) => {
  describeWithData(path, [path, vocabulary, stories], () => {
    const file = openModel(dataPath(path), { tokenizer: dataPath(vocabulary) });
    const backend = backendOf('', 2);
    const scheme = schemes.fp16();

    for (const activations of greedy ? (['int8', 'float32'] as const) : [])
      test(`greedy text, ${activations} activations`, async () => {
        const [prompt, text] = greedy!;
        using model = await Model.open(backend, file, { activations });
        const maxTokens = file.tokenizer.encode(text).length;
        const { text: written } = await model.generate(prompt, { scheme, maxTokens }).finish();
        expect(written.slice(0, text.length)).toBe(text);
      });

    test('losses of TinyStories', async () => {
      using model = await Model.open(backend, file, { activations: 'float32' });
      using cache = await model.createCache({ scheme, memory: '256MiB' });
      const count = Number(process.env.INNERKV_STORIES ?? FEW);
      const texts = readFileSync(dataPath(stories), 'utf8').split('\n').slice(0, count);
      let [sum, scored] = [0, 0];
      for (const line of texts) {
        const { text: story } = JSON.parse(line) as { text: string };
        const tokens = file.tokenizer.encode(story).slice(0, file.config.contextLength);
        using sequence = cache.sequence();
        const losses = await model.nll(sequence, tokens);
        sum += losses.reduce((a, b) => a + b, 0);
        scored += tokens.length - 1;
      }
      if (count === RECORDED) expect(scored).toBe(79_880);
      expect(Math.abs(sum / scored - (count === RECORDED ? all : few))).toBeLessThan(1e-3);
    }, 300_000);
  });
});
