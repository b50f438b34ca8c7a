/**
 * What a command line says about schemes: `NAME[:CALIBRATION][[LAYERS=NAME,…]][@A+B]`, with lists between commas and grids in
 * braces.
 */
import { type Model } from '../model';
import { calibratedFromPrompt } from '../eval/calibrate';
import { type Contender } from '../eval/perplexity';
import {
  builtinSchemes,
  schemeNamed,
  type BitsOptions,
  type DescribedScheme,
  type Moments,
} from '../schemes';
import { UsageError } from './command';

/** Moments by the name that a scheme may call them by; the first serve those that name none. */
export type Calibrations = ReadonlyMap<string, Moments>;

export const schemeNotes = [
  `Schemes: ${builtinSchemes.map(({ name }) => name).join(', ')};`,
  'also any rotated-kXvY, calibrated-kXvY, innerq-kXvY-symmetric (or -asymmetric, -hybrid), and prompt-kXvY, which is',
  'calibrated on the first 512 tokens of each window. kXoN or vXoN keeps the N largest numbers of each key or value apart:',
  'rotated-k2o1v2. Behind a name, in this order:',
  '  -no-PART         leaves a part out: mean, rotation, clip, unbiased, and of calibrated lambda, feedback, blocks',
  '  :NAME            calibrated on the file of --calibration NAME=FILE instead of the first one',
  '  [0-1=q8,29=fp16] stores these layers otherwise',
  '  @0+0             keeps other 16-bit windows than --windows',
  'Braces make grids: calibrated-k{2,3}v{2,3}@{32+96,4+28} are eight schemes.',
].join('\n');

/** Parts of a list; commas inside braces and brackets belong to their part. */
function parts(list: string): string[] {
  const found: string[] = [];
  let [depth, begin] = [0, 0];
  for (let i = 0; i < list.length; i++) {
    if ('{['.includes(list[i]!)) depth++;
    else if ('}]'.includes(list[i]!)) depth--;
    else if (list[i] === ',' && depth === 0) {
      found.push(list.slice(begin, i));
      begin = i + 1;
    }
  }
  return [...found, list.slice(begin)].map((part) => part.trim());
}

/** "a{b,c}{d,e}" → abd, abe, acd, ace. */
function expand(pattern: string): string[] {
  const [whole, before, inside, after] = /^([^{]*)\{([^{}]*)\}(.*)$/.exec(pattern) ?? [];
  if (whole === undefined) return [pattern];
  return inside!.split(',').flatMap((choice) => expand(`${before!}${choice}${after!}`));
}

/** Every scheme of the lists and grids once, in the order in which they were given. */
export function schemeNames(given: readonly string[]): string[] {
  const names = [...new Set(given.flatMap(parts).flatMap(expand))];
  if (names.includes('') || names.some((name) => /[{}]/.test(name)))
    throw new UsageError('--scheme must be names between commas, with grids in {a,b}');
  return names;
}

export function windowsNamed(given: string): { sink: number; recent: number } {
  const [, sink, recent] = /^(\d{1,5})\+(\d{1,5})$/.exec(given) ?? [];
  if (sink === undefined) throw new UsageError(`--windows must be like 32+96, not "${given}"`);
  return { sink: Number(sink), recent: Number(recent) };
}

function momentsOf(calibrations: Calibrations, name: string | undefined): Moments | undefined {
  if (name === undefined) return calibrations.values().next().value;
  const moments = calibrations.get(name);
  if (!moments) throw new UsageError(`there is no --calibration ${name}=FILE`);
  return moments;
}

/** Names are the user's mistake, so they are errors of usage. */
function named(name: string, moments: Moments | undefined): DescribedScheme {
  try {
    return schemeNamed(name, moments);
  } catch (error) {
    const reason = error instanceof Error ? error.message.replace(/\.$/, '') : String(error);
    throw new UsageError(
      reason.includes('needs calibration moments') ? `${reason}: --calibration FILE` : reason,
      { cause: error },
    );
  }
}

/** "0=q8" and "28-29=calibrated-k4v4:c4", where `own` stands for the moments that are not named. */
export function layersNamed(
  entries: readonly string[],
  calibrations: Calibrations,
  own?: string,
): ReadonlyMap<number, DescribedScheme> {
  const layers = new Map<number, DescribedScheme>();
  for (const entry of entries) {
    const [, first, last, name, calibration = own] =
      /^(\d{1,4})(?:-(\d{1,4}))?=([^:=]+)(?::([\w-]+))?$/.exec(entry) ?? [];
    if (first === undefined || name === undefined)
      throw new UsageError(`layers must be like 0=q8,28-29=fp16, not "${entry}"`);
    const scheme = named(name, momentsOf(calibrations, calibration));
    for (let layer = Number(first); layer <= Number(last ?? first); layer++) layers.set(layer, scheme);
  }
  return layers;
}

export function contenderNamed(given: string, calibrations: Calibrations, model: Model): Contender {
  const [whole, name, calibration, layers, windows] =
    /^([^:[\]@]+)(?::([\w-]+))?(?:\[([^[\]]*)\])?(?:@(.*))?$/.exec(given) ?? [];
  if (whole === undefined || name === undefined) throw new UsageError(`"${given}" is no scheme`);
  const exceptions = {
    ...(windows !== undefined && { windows: windowsNamed(windows) }),
    ...(layers !== undefined && { layers: layersNamed(parts(layers), calibrations, calibration) }),
  };
  const [, keyBits, valueBits] = /^prompt-k(\d+)v(\d+)$/.exec(name) ?? [];
  if (keyBits === undefined)
    return { name: given, scheme: named(name, momentsOf(calibrations, calibration)), ...exceptions };
  const bits = { keyBits: Number(keyBits), valueBits: Number(valueBits) } as BitsOptions;
  return {
    name: given,
    scheme: (tokens, options) => calibratedFromPrompt(model, tokens, { ...bits, ...options }),
    ...exceptions,
  };
}
