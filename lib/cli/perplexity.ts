/** `innerkv perplexity`: loss and divergence of a model on a text, over caches of several schemes. */
import { writeFileSync } from 'node:fs';
import { EXIT, text, type Command, type Values } from './command';
import { schemeNotes } from './contenders';
import {
  measurementOptions,
  percent,
  protocolNotes,
  runMeasurement,
  settingLine,
  signed,
  type MeasurementReport,
} from './measurement';
import { bytes, dim, table } from './terminal';

export const perplexity: Command = {
  name: 'perplexity',
  summary: 'what schemes cost a model on a text, against a 16-bit cache',
  options: {
    ...measurementOptions,
    out: { value: 'FILE', help: 'also write the JSON there, after every window' },
  },
  notes: `${protocolNotes}\n\n${schemeNotes}`,
  async run(values: Values) {
    const out = text(values, 'out');
    const report = await runMeasurement(values, {
      onReport: (part) => {
        if (out !== undefined) writeFileSync(out, `${JSON.stringify(part, null, 2)}\n`);
      },
    });
    if (values.json) console.log(JSON.stringify(report, null, 2));
    else print(report);
    return EXIT.ok;
  },
};

function print(report: MeasurementReport): void {
  console.log(`${settingLine(report)}\n`);
  const titles = [
    ...['scheme', 'bits', 'in all', 'ppl', 'change', 'bits/byte'],
    ...['KLD', '99 % KLD', 'top-1', 'rms Δp', 'cache', 'tokens/s'],
  ];
  const rows = report.schemes.map((row) => [
    row.scheme,
    row.bitsPerValue.toFixed(2),
    row.bitsPerValueInAll.toFixed(2),
    row.perplexity.toFixed(3),
    signed(row.perplexityChange),
    row.bitsPerByte?.toFixed(4) ?? '',
    row.meanKld.toFixed(4),
    row.kld99.toFixed(3),
    percent(row.topAgreement),
    percent(row.rmsShift),
    bytes(row.cacheBytes),
    row.tokensPerSecond.toFixed(1),
  ]);
  console.log(
    table(
      titles.map((title) => ({ title, text: title === 'scheme' })),
      rows,
    ),
  );
  if (report.protocol.protocol === 'P4') {
    console.log('\nnats per token by position in the window');
    const [first] = report.schemes;
    console.log(
      table(
        [
          { title: 'scheme', text: true },
          ...first!.buckets.map(({ from, to }) => ({ title: `${from}…${to - 1}` })),
        ],
        report.schemes.map((row) => [row.scheme, ...row.buckets.map(({ nll }) => nll.toFixed(4))]),
      ),
    );
  }
  console.log(
    dim(
      '\nbits: codes and scales per number; in all: everything held at the end of a window. KLD in nats, top-1: same most probable\n' +
        `token, rms Δp: change of the right token's probability, all against the 16-bit cache. ${report.seconds.toFixed(0)} s`,
    ),
  );
}
