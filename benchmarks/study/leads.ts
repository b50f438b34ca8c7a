/** Experiments that no scheme of the library can make: what would other rounding, other scales, a basis for values bring? */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { createBackend } from '../../lib/backend';
import { writeWhole } from '../../lib/cli/files';
import { versions } from '../../lib/cli/version';
import { leadingTokens, perplexity, planOf, type SchemePerplexity } from '../../lib/eval';
import { Model, openModel } from '../../lib/model';
import { readMoments, schemeNamed } from '../../lib/schemes';
import { roundingRows, type RoundingRow } from './rounding';
import { inValueBasis, valueBases, valueMoments, type ValueBasis } from './values';

export interface Lead {
  readonly name: string;
  readonly question: string;
  readonly run: (places: LeadPlaces) => Promise<void>;
}

export interface LeadPlaces {
  readonly model: string;
  readonly data: (name: string) => string;
  /** Moments of wiki.utf8. */
  readonly moments: () => Promise<string>;
  readonly work: string;
  readonly out: string;
  readonly threads: number;
}

interface ValueBasisReport {
  readonly kinds: Readonly<Partial<Record<ValueBasis, readonly SchemePerplexity[]>>>;
}
export interface RoundingReport {
  readonly rows: readonly RoundingRow[];
}

const facts = () => ({ versions: versions(), date: new Date().toISOString().slice(0, 10) });
const json = (value: object) => `${JSON.stringify(value, null, 2)}\n`;

const VALUE_SCHEMES = ['calibrated-k3v2', 'calibrated-k2v2', 'calibrated-k2v1'];
const [VALUE_TOKENS, VALUE_WINDOWS] = [1024, 2];

async function values({ model, data, moments, work, out, threads }: LeadPlaces): Promise<void> {
  const { origin: _, ...anyModel } = readMoments(await moments());
  const kinds: Partial<Record<ValueBasis, readonly SchemePerplexity[]>> = existsSync(out)
    ? { ...(JSON.parse(readFileSync(out, 'utf8')) as ValueBasisReport).kinds }
    : {};
  const file = openModel(model);
  const text = (name: string) => readFileSync(data(name), 'utf8');
  const plan = planOf('P3', { window: VALUE_TOKENS });
  const count = VALUE_WINDOWS * VALUE_TOKENS;
  const ids = leadingTokens(file.tokenizer, text('texts/wikitext-2-raw/wikitext2-test-joined.txt'), count);
  await using backend = await createBackend({ backend: 'cpu', threads });
  using plain = await Model.open(backend, file, { activations: 'float32' });
  const observed = leadingTokens(file.tokenizer, text('texts/calibration/wiki.utf8'), 2048);
  const second = await valueMoments(plain, observed);
  for (const kind of Object.keys(valueBases) as ValueBasis[]) {
    if (kinds[kind]) continue;
    using changed = inValueBasis(backend, file, kind, second, join(work, `values-${kind}.bin`));
    const contenders = VALUE_SCHEMES.map((name) => ({ name, scheme: schemeNamed(name, anyModel) }));
    const report = await perplexity(changed, ids, { plan, contenders });
    kinds[kind] = report.schemes;
    writeWhole(
      out,
      json({ ...facts(), text: 'wikitext2-test-joined.txt', protocol: plan, valueBases, kinds }),
    );
    const line = report.schemes.map(({ scheme, meanKld }) => `${scheme} ${meanKld.toFixed(5)}`);
    console.log(`${kind}: ${line.join(', ')}`);
  }
}

function rounding({ data, out }: LeadPlaces): Promise<void> {
  const rows = roundingRows(data);
  writeWhole(out, json({ ...facts(), rows } satisfies RoundingReport & object));
  for (const row of rows)
    console.log(`${row.bits} bits, ${row.search}, scale of ${row.scale}: ${row.weightedError.toFixed(5)}`);
  return Promise.resolve();
}

export const leads: readonly Lead[] = [
  { name: 'value-basis', question: 'what a calibrated basis of the values would bring', run: values },
  { name: 'rounding', question: 'what wider searches cost less, and scales of 8 bits more', run: rounding },
];
