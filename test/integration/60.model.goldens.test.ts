import { schemes } from '../../lib';
import { Model, openModel } from '../../lib/model';
import { decodeFloats, readSafetensors } from '../../lib/schemes/safetensors';
import { dataPath, describeWithData } from '../support/data';
import { backendOf, disposeBackends } from '../support/native';

// A real model against recorded runs of other code in float32, whose cache was float32 too.

const files = {
  model: 'models/smollm2-135m/smollm2-135m-instruct.q4_1.gguf',
  golden: 'golden/smollm2_wikitext2.safetensors',
};
const WINDOW = 2048;

afterAll(disposeBackends);

const perplexity = (nll: Iterable<number>) => {
  const all = [...nll];
  return Math.exp(all.reduce((a, b) => a + b, 0) / all.length);
};
const off = (actual: number, expected: number) => Math.abs(actual / expected - 1);

describeWithData('SmolLM2-135M', Object.values(files), () => {
  const backend = backendOf('', 2);
  const file = openModel(dataPath(files.model));
  const golden = readSafetensors(dataPath(files.golden));
  const tensor = (name: string) => golden.tensors.get(name)!;
  const ids = new Int32Array(Uint8Array.from(tensor('token_ids').bytes).buffer);
  const windows = Array.from({ length: 4 }, (_, i) => ids.subarray(i * WINDOW, (i + 1) * WINDOW));
  const recorded = decodeFloats(tensor('nll'))!;
  const recordedOf = (window: number) =>
    recorded.subarray(window * (WINDOW - 1), (window + 1) * (WINDOW - 1));
  const cacheOptions = { scheme: schemes.fp16(), memory: '2GiB' };

  test('perplexity of four windows of WikiText-2, float32 activations', async () => {
    using model = await Model.open(backend, file, { activations: 'float32' });
    using cache = await model.createCache(cacheOptions);
    const items = windows.map((tokens) => ({ sequence: cache.sequence(), tokens }));
    const nll = (await model.nllBatch(items)).map((losses) => losses.subarray(0, WINDOW - 1));
    const halves = nll.map((losses) => losses.subarray(WINDOW / 2 - 1));
    expect(off(perplexity(nll[0]!), 15.147)).toBeLessThan(0.003);
    expect(off(perplexity(halves[0]!), 16.287)).toBeLessThan(0.003);
    expect(off(perplexity(nll.flatMap((losses) => [...losses])), 24.1452)).toBeLessThan(0.003);
    expect(off(perplexity(halves.flatMap((losses) => [...losses])), 20.3816)).toBeLessThan(0.003);
    // Keys and values are binary16 here: single losses move, none of them far.
    const worst = nll.map((losses, w) =>
      Math.max(...losses.map((loss, i) => Math.abs(loss - recordedOf(w)[i]!))),
    );
    expect(Math.max(...worst)).toBeLessThan(0.05);
  }, 300_000);

  test('logits at a recorded position, and decoding with 8-bit activations', async () => {
    using model = await Model.open(backend, file);
    using cache = await model.createCache(cacheOptions);
    using sequence = cache.sequence();
    const position = new Int32Array(Uint8Array.from(tensor('positions').bytes).buffer)[0]!;
    const prompt = windows[0]!.subarray(0, position + 1);
    const logits = await model.forward(sequence, prompt, { activations: 'float32' });
    const expected = decodeFloats(tensor('logits'))!.subarray(0, model.config.vocabulary);
    const squares = (values: ArrayLike<number>) => Array.from(values).reduce((a, x) => a + x * x, 0);
    expect(Math.sqrt(squares(logits.map((x, i) => x - expected[i]!)) / squares(expected))).toBeLessThan(
      0.002,
    );

    const nll: number[] = [];
    using decoding = cache.sequence();
    for (let i = 0; i < 96; i++)
      nll.push((await model.nll(decoding, [windows[0]![i]!], { targets: [windows[0]![i + 1]!] }))[0]!);
    expect(off(perplexity(nll), perplexity(recordedOf(0).subarray(0, 96)))).toBeLessThan(0.01);
  }, 300_000);
});

describeWithData('stories260K: heads of 8 channels', ['models/stories260K/stories260K.bin'], () => {
  test('greedy text is the recorded one', async () => {
    const file = openModel(dataPath('models/stories260K/stories260K.bin'));
    using model = await Model.open(backendOf('', 2), file);
    using cache = await model.createCache({ scheme: schemes.fp16(), memory: '64MiB' });
    using sequence = cache.sequence();
    const text = [file.config.bos ?? 1];
    while (text.length <= 70) {
      const logits = await model.forward(sequence, text.slice(-1));
      text.push(logits.indexOf(Math.max(...logits)));
    }
    expect(file.tokenizer.decode(text.slice(1))).toBe(
      'Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw ' +
        'a big, red ball. She wanted to play with it, but it was too high.\nLily\'s mom said, "',
    );
  });
});
