import { render } from "preact";

import { App } from "./App";
import * as router from "./router";
import "./style.css";
import * as theme from "./theme";

router.start();
theme.start();
const place = document.getElementById("app");
if (place) render(<App />, place);
