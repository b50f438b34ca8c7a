/** `innerkv sweep`: many schemes on one text, and which of them no other beats in size and divergence together. */
import { existsSync, readFileSync } from 'node:fs';
import { paretoFront } from '../eval/pareto';
import { type SchemePerplexity, type WindowRecord } from '../eval/records';
import { invalid } from '../errors';
import { EXIT, text, type Command, type Values } from './command';
import { schemeNotes } from './contenders';
import { writeWhole } from './files';
import {
  measurementOptions,
  percent,
  protocolNotes,
  runMeasurement,
  settingLine,
  signed,
  type MeasurementReport,
  type MeasurementSetting,
} from './measurement';
import { renderSvg, type Plot } from './svg';
import { dim, table } from './terminal';

export type SweepRow = SchemePerplexity & { readonly front: boolean };
export type SweepReport = Omit<MeasurementReport, 'schemes'> & { readonly schemes: readonly SweepRow[] };
type SweepFile = SweepReport & { readonly prefill: string; readonly records: readonly WindowRecord[] };

/** More of them would hide each other. */
const LABELS = 16;

export const sweep: Command = {
  name: 'sweep',
  summary: 'a grid of schemes on a text: size against divergence, and its Pareto front',
  options: {
    ...measurementOptions,
    out: {
      value: 'FILE',
      help: 'JSON, written after every window; what it holds already is not measured again',
    },
    svg: { value: 'FILE', help: 'also draw it' },
  },
  notes: [
    protocolNotes,
    '',
    schemeNotes,
    '',
    'innerkv sweep --model M --text F --chunks 1 --calibration M.calib.safetensors --out sweep.json --svg sweep.svg \\',
    "  --scheme 'q4_0@0+0,innerq-base,{rotated,calibrated}-k{2,3,4}v{2,3,4}' --scheme 'calibrated-k2v2@{4+28,4+124,64+64}'",
    '',
    'Ctrl-C ends a sweep; the same command with the same --out goes on where it was. Other schemes may be given then, or more',
    '--chunks, but the same model, text, protocol, windows, layers and calibration.',
  ].join('\n'),
  async run(values: Values) {
    const [out, svg] = [text(values, 'out'), text(values, 'svg')];
    const prefill = text(values, 'chunk') ?? 'default';
    const report = ranked(
      await runMeasurement(values, {
        known: (setting) => (out === undefined ? [] : knownRecords(out, setting, prefill)),
        onReport: (part, records) => {
          if (out !== undefined) writeWhole(out, sweepFile({ ...ranked(part), prefill, records }));
        },
      }),
    );
    if (svg !== undefined) writeWhole(svg, renderSvg(plotOf(report.schemes, titleOf(report))));
    if (values.json) console.log(JSON.stringify(report, null, 2));
    else print(report, svg);
    return EXIT.ok;
  },
};

/** Rows by size, with the front marked. The 16-bit cache is what is compared with, so it is not on it. */
export function ranked<R extends Pick<MeasurementReport, 'schemes'>>(
  report: R,
): Omit<R, 'schemes'> & { readonly schemes: readonly SweepRow[] } {
  const rows = [...report.schemes].sort((a, b) => a.bitsPerValueInAll - b.bitsPerValueInAll);
  const packed = rows.filter(({ scheme }) => scheme !== 'fp16');
  const best = paretoFront(packed, (row) => [row.bitsPerValueInAll, row.meanKld]);
  const front = new Set(packed.filter((_, i) => best[i]).map(({ scheme }) => scheme));
  return { ...report, schemes: rows.map((row) => ({ ...row, front: front.has(row.scheme) })) };
}

/** JSON with a line for each row and each record. */
function sweepFile({ schemes, records, ...rest }: SweepFile): string {
  const lines = (name: string, items: readonly object[]) =>
    `  "${name}": [\n${items.map((item) => `    ${JSON.stringify(item)}`).join(',\n')}\n  ]`;
  const head = JSON.stringify(rest, null, 2).slice(0, -2);
  return `${head},\n${lines('schemes', schemes)},\n${lines('records', records)}\n}\n`;
}

/** Everything that a record depends on. Of the calibrations those that both runs have. */
function same(a: MeasurementSetting, b: MeasurementSetting): boolean {
  const shared = Math.min(a.calibrations.length, b.calibrations.length);
  const key = ({
    model,
    text,
    protocol,
    activations,
    cacheWindows,
    layers,
    calibrations,
  }: MeasurementSetting) =>
    JSON.stringify([
      ...[model.fingerprint, text.sha256, protocol, activations, cacheWindows, layers],
      calibrations.slice(0, shared).map(({ name, sha256 }) => [name, sha256]),
    ]);
  return key(a) === key(b);
}

/** @throws ERR_INNERKV_INVALID_ARGUMENT when the file is no sweep, or one of another setting. */
function knownRecords(path: string, setting: MeasurementSetting, prefill: string): readonly WindowRecord[] {
  if (!existsSync(path)) return [];
  let old: SweepFile;
  try {
    old = JSON.parse(readFileSync(path, 'utf8')) as SweepFile;
    if (![old.records, old.calibrations].every((list) => Array.isArray(list)))
      throw new Error('it has no records');
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw invalid(`${path} is there and is no sweep: ${reason}.`);
  }
  const { decoded } = setting.protocol;
  if (!same(old, setting) || (!decoded && old.prefill !== prefill))
    throw invalid(`${path} holds a sweep of another model, text, protocol or setting: name another file.`);
  return old.records;
}

/** Families are what stands before the bits. */
function familyOf(scheme: string): string {
  return /^[a-z]+(?:\d+(?:_\d+)?)?/.exec(scheme)?.[0] ?? scheme;
}

function titleOf({ model, text: source, protocol, windows }: SweepReport): string {
  return `${model.name}, ${source.file}, ${protocol.protocol}, ${windows} x ${protocol.window} tokens`;
}

/** All points have labels where there are few, those of the front else. */
export function plotOf(rows: readonly SweepRow[], title: string): Plot {
  const packed = rows.filter(({ scheme }) => scheme !== 'fp16');
  const few = packed.length <= LABELS;
  const point = (row: SweepRow) => ({
    x: row.bitsPerValueInAll,
    y: row.meanKld,
    label: few || row.front ? row.scheme : '',
    title: `${row.scheme}: ${row.bitsPerValueInAll.toFixed(2)} bits, KLD ${row.meanKld.toFixed(4)}`,
  });
  const families = [...new Set(packed.map(({ scheme }) => familyOf(scheme)))];
  return {
    title,
    xLabel: 'bits per number, 16-bit windows included',
    yLabel: 'mean KLD from the 16-bit cache, nats',
    series: [
      ...families.map((family) => ({
        name: family,
        style: 'points' as const,
        points: packed.filter(({ scheme }) => familyOf(scheme) === family).map(point),
      })),
      {
        name: 'Pareto front',
        style: 'line' as const,
        points: packed.filter(({ front }) => front).map((row) => ({ ...point(row), label: '' })),
      },
    ],
  };
}

function print(report: SweepReport, svg: string | undefined): void {
  console.log(`${settingLine(report)}\n`);
  const titles = ['', 'scheme', 'bits', 'in all', 'ppl', 'change', 'KLD', '99 % KLD', 'top-1', 'rms Δp'];
  const rows = report.schemes.map((row) => [
    row.front ? '*' : '',
    row.scheme,
    row.bitsPerValue.toFixed(2),
    row.bitsPerValueInAll.toFixed(2),
    row.perplexity.toFixed(3),
    signed(row.perplexityChange),
    row.meanKld.toFixed(4),
    row.kld99.toFixed(3),
    percent(row.topAgreement),
    percent(row.rmsShift),
  ]);
  console.log(
    table(
      titles.map((title) => ({ title, text: title === '' || title === 'scheme' })),
      rows,
    ),
  );
  console.log(
    dim(
      '\n* no other scheme is as small in all (16-bit windows and zero points included) and diverges as little. ' +
        `${report.seconds.toFixed(0)} s${svg === undefined ? '' : `; plot: ${svg}`}`,
    ),
  );
}
