import { defineConfig } from "vite";

// The build is committed and embedded in the coordinator: names carry a hash, nothing is fetched from elsewhere, no source maps.
export default defineConfig({
  build: { target: "es2022", outDir: "dist", emptyOutDir: true, sourcemap: false, assetsInlineLimit: 0, modulePreload: { polyfill: false } },
  server: { proxy: { "/shanty.v1": "http://127.0.0.1:7461" } },
});
