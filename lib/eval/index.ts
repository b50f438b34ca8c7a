/** Calibration of schemes to a model, and what schemes cost it. */
export { calibrate, calibratedFromPrompt } from './calibrate';
export type { CalibrateOptions, PromptOptions } from './calibrate';
export { perplexity } from './perplexity';
export type { Contender, PerplexityOptions, PerplexityReport } from './perplexity';
export type { PositionBucket, SchemePerplexity, WindowRecord } from './records';
export { planOf, protocols } from './protocols';
export type { Protocol, ProtocolPlan } from './protocols';
export { leadingTokens } from './text';
