/** Where a command computes, as its options say. */
import { type BackendOptions } from '../backend';
import { count, text, UsageError, type Option, type Values } from './command';

export const DEVICE_OPTIONS = {
  backend: { value: 'cpu|cuda', help: 'where the model and its cache live', default: 'cpu' },
  threads: { value: 'N', help: 'threads (default: all cores)' },
} as const satisfies Record<string, Option>;

/** For createBackend(). */
export function deviceOptions(values: Values): BackendOptions {
  const backend = text(values, 'backend') ?? 'cpu';
  if (backend !== 'cpu' && backend !== 'cuda')
    throw new UsageError(`--backend must be cpu or cuda, not "${backend}"`);
  return { backend, ...(values.threads !== undefined && { threads: count(values, 'threads') }) };
}
