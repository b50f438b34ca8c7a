/** `innerkv calibrate`: moments of a model's keys and queries, for schemes.calibrated(). */
import { basename } from 'node:path';
import { createBackend } from '../backend';
import { calibrate as observe } from '../eval/calibrate';
import { leadingTokens, readText } from '../eval/text';
import { Model, openModel } from '../model';
import { encodeMoments } from '../schemes';
import { EXIT, count, required, type Command, type Values } from './command';
import { DEVICE_OPTIONS, deviceOptions } from './device';
import { writeWhole } from './files';
import { interruptible } from './interrupt';
import { Progress, bytes, pairs } from './terminal';
import { versions } from './version';

export const calibrate: Command = {
  name: 'calibrate',
  summary: 'statistics of a model on a text, for the calibrated schemes',
  options: {
    model: { value: 'M', help: 'a .gguf, a folder with safetensors, or a llama2.c .bin' },
    text: { value: 'F', help: 'any text that is not the one to be measured on, in UTF-8' },
    tokens: { value: 'N', help: 'tokens from its beginning', default: '2048' },
    output: { value: 'FILE', short: 'o', help: 'safetensors file to write' },
    ...DEVICE_OPTIONS,
  },
  async run(values: Values) {
    const [path, source, output] = [
      required(values, 'model'),
      required(values, 'text'),
      required(values, 'output'),
    ];
    const tokens = count(values, 'tokens');
    const device = deviceOptions(values);
    const text = readText(source);
    const file = openModel(path);
    await using backend = await createBackend(device);
    using model = await Model.open(backend, file, { activations: 'float32' });
    const started = performance.now();
    const progress = new Progress();
    using interrupt = interruptible();
    progress.update(0, 'text to tokens');
    const ids = leadingTokens(file.tokenizer, text, tokens);
    const moments = await observe(model, ids, {
      tokens,
      signal: interrupt.signal,
      onProgress: (done, total) => progress.update(done / total, `${done} tokens`),
    });
    progress.clear();
    const data = encodeMoments(moments, { text: `${basename(source)}, first ${ids.length} tokens` });
    writeWhole(output, data);
    const report = {
      versions: versions(),
      output,
      bytes: data.byteLength,
      ...moments.origin,
      layers: moments.layers.size,
      kvHeads: moments.kvHeads,
      headDim: moments.headDim,
      seconds: (performance.now() - started) / 1000,
    };
    if (values.json) console.log(JSON.stringify(report, null, 2));
    else
      console.log(
        pairs([
          ['model', `${report.model} (${report.fingerprint.slice(0, 12)}…)`],
          ['moments', `${report.layers} layers of ${report.kvHeads} KV heads of ${report.headDim} channels`],
          ['tokens', `${ids.length} of ${basename(source)}, ${report.tokens} of their keys`],
          ['file', `${output}, ${bytes(report.bytes)}`],
          ['time', `${report.seconds.toFixed(1)} s`],
        ]),
      );
    return EXIT.ok;
  },
};
